"""Plain references for the parity tests.

Nothing here imports lemo. References run unmodified transformers modules; hooks leave out what is left out.
Plans are computed by plain loops, one document and one block at a time.

Shapes: B batch, T tokens, D hidden. A row is an index into the flattened B·T tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tiny import BLOCK, Batch, causal_lm, layers_of, mlp_output_module, window_of


def blocks_of(document: list[int], block_size: int) -> list[list[int]]:
    """The document's rows, block by block."""
    return [document[i : i + block_size] for i in range(0, len(document), block_size)]


@dataclass(frozen=True)
class EnergyRule:
    """How `backward` mode chooses, in words of lemo.SparsityConfig."""

    fidelity: float = 1.0
    keep: float | None = None
    labelled: str = "always"
    block_size: int = BLOCK
    keep_sink: bool = True


def energy_rows(gradient_BTD: Tensor, batch: Batch, rule: EnergyRule) -> set[int]:
    """Rows kept by the energy rule, document by document (DESIGN 4.2 and 4.6)."""
    energy = gradient_BTD.detach().double().pow(2).sum(-1).flatten().tolist()
    labelled_rows = batch.labelled_rows()
    kept: set[int] = set()
    for document in batch.documents:
        blocks = blocks_of(document, rule.block_size)
        energies = [sum(energy[row] for row in block) for block in blocks]
        order = sorted(range(len(blocks)), key=lambda i: -energies[i])
        chosen: list[int] = []
        if rule.labelled == "always":
            chosen = [i for i, block in enumerate(blocks) if labelled_rows.intersection(block)]
        cap = len(blocks) if rule.keep is None else max(1, math.ceil(rule.keep * len(blocks)))
        if len(chosen) > cap:
            raise ValueError("labelled blocks alone exceed keep: use segments")
        if rule.keep_sink and 0 not in chosen and energies[0] > 0.0 and cap > max(1, len(chosen)):
            chosen.append(0)
        competing = [i for i in order if i not in chosen and energies[i] > 0.0]
        wanted, held = rule.fidelity * sum(energies[i] for i in competing), 0.0
        for i in competing:
            if len(chosen) >= cap or (rule.fidelity < 1.0 and held >= wanted):
                break
            chosen.append(i)
            held += energies[i]
        kept.update(row for i in chosen for row in blocks[i])
    return kept


def row_mask(rows: set[int], batch: Batch, dtype: torch.dtype) -> Tensor:
    """[B·T] of 0 and 1."""
    mask = torch.zeros(batch.rows, dtype=dtype, device=batch.input_ids.device)
    mask[sorted(rows)] = 1.0
    return mask


def allowed_mask(batch: Batch, window: int | None, keys: set[int] | None = None) -> Tensor:
    """Bool [B, 1, T, T]: query row (third) may see key row (fourth). Causal, inside one document, in original
    coordinates; `keys` restricts the keys. A query without any key sees itself: nothing uses its output."""
    B, T = batch.input_ids.shape
    allowed = torch.zeros(B, T, T, dtype=torch.bool)
    for document in batch.documents:
        for query in document:
            for key in document:
                near = window is None or query - key < window
                if key <= query and near and (keys is None or key in keys):
                    allowed[query // T, query % T, key % T] = True
    alone = ~allowed.any(-1)
    allowed |= torch.diag_embed(alone)
    return allowed[:, None].to(batch.input_ids.device)


def tensor_of(output: Any) -> Tensor:
    """A module's output, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def hooks(handles: list[Any]) -> Iterator[None]:
    """Remove the hooks at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def explicit_masks(
    model: nn.Module, batch: Batch, keys: list[set[int] | None] | None = None, seen: list[Tensor] | None = None
) -> list[Any]:
    """Hooks that hand every attention module our own mask in place of transformers' (OPT has none for packing).

    `seen`: for each layer, bool [B, H, T, T] in the mask's place, or what is added to scores, -inf for nothing.
    """
    eager = causal_lm(model).config._attn_implementation == "eager"
    dtype = next(model.parameters()).dtype
    handles = []
    for i, layer in enumerate(layers_of(model)):
        mask = seen[i] if seen else allowed_mask(batch, window_of(model, i), keys[i] if keys else None)
        if mask.dtype != torch.bool:
            mask = mask.to(dtype).clamp(min=torch.finfo(dtype).min)
        elif eager:
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

        def replace(module: nn.Module, args: tuple, kwargs: dict, mask: Tensor = mask) -> tuple[tuple, dict]:
            return args, kwargs | {"attention_mask": mask}

        handles.append(layer.self_attn.register_forward_pre_hook(replace, with_kwargs=True))
    return handles


def backward_reference(
    model: nn.Module,
    batch: Batch,
    choose: Callable[[int, Tensor], set[int]],
    *,
    kv_grad: str = "all",
    compensate: bool = False,
    loss_of: Callable[[Any], Tensor] | None = None,
    seen: list[Tensor] | None = None,
    **call: Any,
) -> tuple[Tensor, list[set[int]]]:
    """Dense forward, then a backward whose branch gradients are cut to the rows that `choose` gives for a layer.

    `choose(layer, gradient_BTD)` sees the gradient at the layer's output. Gradients are left in `.grad`.
    `seen`: what queries see, as `explicit_masks` takes it.
    `compensate`: kept rows stand in for a document's others (`entering_with_shares`, `with_fitted_rest`).
    Returns the loss and each layer's rows. The residual's gradient is never touched.
    """
    layers = layers_of(model)
    rows: list[set[int]] = [set() for _ in layers]

    def cut(tensor: Tensor, layer: int) -> None:
        leading = tensor.shape[: 1 if tensor.dim() == 2 else 2]  # OPT's fc2 gives [B·T, D], Qwen3's k_norm [B, T, K, d]
        shape = (*leading, *[1] * (tensor.dim() - len(leading)))
        if tensor.requires_grad:  # the layer's rows are known when this runs: its output's gradient comes first
            tensor.register_hook(lambda g: g * row_mask(rows[layer], batch, g.dtype).view(shape))

    def plan(tensor: Tensor, layer: int) -> None:
        def on_gradient(gradient: Tensor) -> None:
            rows[layer] = choose(layer, gradient)

        tensor.register_hook(on_gradient)

    outer: dict[tuple[int, str], Tensor] = {}  # gradient at a residual sum, every row's

    def cut_and_share(tensor: Tensor, layer: int, branch: str) -> None:
        def on_gradient(gradient: Tensor) -> Tensor:
            outer[layer, branch] = gradient.reshape(batch.rows, -1)
            return entering_with_shares(outer[layer, branch], rows[layer], batch).view_as(gradient)

        tensor.register_hook(on_gradient)

    def fit_rest(tensor: Tensor, layer: int, branch: str) -> None:
        def on_gradient(gradient: Tensor) -> Tensor:
            at_sum = outer[layer, branch]
            return with_fitted_rest(gradient.reshape(batch.rows, -1), at_sum, rows[layer], batch).view_as(gradient)

        if tensor.requires_grad:
            tensor.register_hook(on_gradient)

    def fit_at_input(module: nn.Module, args: tuple, kwargs: dict, layer: int, branch: str) -> tuple[tuple, dict]:
        # A tensor of its own: the one given carries the hook of the layer below, which must see the finished gradient.
        own = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]) * 1
        fit_rest(own, layer, branch)
        return ((own, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": own})

    handles = explicit_masks(model, batch, seen=seen)
    for i, layer in enumerate(layers):
        cuts = [(layer.self_attn, cut), (mlp_output_module(layer), cut)]
        if compensate:
            post_norm = getattr(layer, "do_layer_norm_before", True) is False
            cuts = [
                (layer.self_attn, lambda tensor, i: cut_and_share(tensor, i, "attention")),
                (mlp_output_module(layer), lambda tensor, i: cut_and_share(tensor, i, "mlp")),
            ]
            if post_norm:
                cuts.append((layer.self_attn_layer_norm, lambda tensor, i: fit_rest(tensor, i, "mlp")))
            # With norms inside the branches, both start at the layer's input: one number for the two together, from
            # the gradient at the layer's output, which is what the MLP's branch sees.
            at_input = functools.partial(fit_at_input, layer=i, branch="attention" if post_norm else "mlp")
            handles.append(layer.register_forward_pre_hook(at_input, with_kwargs=True))
        if kv_grad == "kept":
            # Keys are what enters attention: after their norm, where the model has one.
            keys = getattr(layer.self_attn, "k_norm", layer.self_attn.k_proj)
            cuts += [(keys, cut), (layer.self_attn.v_proj, cut)]
        for module, how in cuts:
            handles.append(module.register_forward_hook(lambda m, a, out, i=i, how=how: how(tensor_of(out), i)))
        handles.append(layer.register_forward_hook(lambda m, a, out, i=i: plan(tensor_of(out), i)))
    with hooks(handles):
        output = model(**batch.inputs(), **call)
        loss = output.loss if loss_of is None else loss_of(output)
    loss.backward()
    return loss.detach(), rows


def entering_with_shares(gradient_ND: Tensor, rows: set[int], batch: Batch) -> Tensor:
    """What enters a branch: zero outside `rows`, and a document's other rows' sum in equal parts on its rows but the
    first."""
    entering = gradient_ND * row_mask(rows, batch, gradient_ND.dtype)[:, None]
    for document in batch.documents:
        rest = [row for row in document if row not in rows]
        takers = [row for row in document[1:] if row in rows]
        for row in takers:
            entering[row] += gradient_ND[rest].sum(0) / len(takers)
    return entering


def with_fitted_rest(total_ND: Tensor, at_sum_ND: Tensor, rows: set[int], batch: Batch) -> Tensor:
    """The gradient at a branch's input, `total`, where the rows left out got only what passed along the residual.

    a: least squares of what the branch returned against what entered it, over a document's kept rows, between -1 and 1.
    The others get a times their gradient, and what shares brought is lowered by a times the share.
    """
    result = total_ND.clone()
    entering = entering_with_shares(at_sum_ND, rows, batch)
    for document in batch.documents:
        kept = [row for row in document if row in rows]
        rest = [row for row in document if row not in rows]
        if kept and rest:
            e, returned = entering[kept].double(), (total_ND - at_sum_ND)[kept].double()
            a = min(1.0, max(-1.0, float((e * returned).sum() / (e * e).sum())))
            result[rest] += (a * at_sum_ND[rest]).to(result.dtype)
            result[kept] -= (a * (entering - at_sum_ND)[kept]).to(result.dtype)
    return result


def segment_loss(
    logits_BTV: Tensor, batch: Batch, drawn: list[list[tuple[int, int]]], scale: float, items: int
) -> Tensor:
    """scale · Σ of the losses whose predicting row lies in a drawn span / items."""
    V = logits_BTV.shape[-1]
    total = logits_BTV.new_zeros(())
    inside = {row for spans in drawn for start, end in spans for row in range(start, end)}
    T = batch.input_ids.shape[1]
    for row in sorted(inside & batch.labelled_rows()):
        target = batch.labels[row // T, row % T + 1]
        total = total + F.cross_entropy(logits_BTV.reshape(-1, V)[row].float(), target)
    return scale * total / items


def spans_of(document: list[int], spans: int) -> list[tuple[int, int]]:
    """The document cut into equal spans (the last may be shorter), as (first row, row after the last)."""
    size = math.ceil(len(document) / spans)
    return [(document[i], document[min(i + size, len(document)) - 1] + 1) for i in range(0, len(document), size)]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient that isn't None, detached and cloned; and clears them."""
    found = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_hidden(got: Tensor, want: Tensor, rel: float = 1e-5) -> None:
    """Hidden states [rows, D], norm-wise, row by row: sums in another order differ by their largest terms' rounding."""
    error = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert bool((error <= rel).all()), f"largest relative error of a row is {error.max().item():.2e}"


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor], rel: float = 1e-5) -> None:
    """Norm-wise, parameter by parameter.

    A gradient may be zero in exact arithmetic and so rounding noise here (OPT's key bias: softmax ignores it):
    errors are measured against at least 1e-3 of the largest gradient's norm, a key bias's also against its weight's.
    """
    assert want, "the reference has no gradient at all"
    floor = 1e-3 * max(g.norm().item() for g in want.values())
    assert floor > 0, "every reference gradient is zero"
    wrong = []
    for name in sorted(want.keys() | got.keys()):
        if name not in got or name not in want:
            present = (got.get(name) if name in got else want[name]).norm().item()
            if present > 0:
                wrong.append(f"{name}: only in {'got' if name in got else 'reference'}, norm {present:.2e}")
            continue
        error = (got[name].double() - want[name].double()).norm().item()
        weight = want.get(name.removesuffix("bias") + "weight", want[name])
        scale = max(want[name].norm().item(), weight.norm().item() if name.endswith("k_proj.bias") else 0.0, floor)
        if not error <= rel * scale:
            wrong.append(f"{name}: error {error:.2e}, norm {want[name].norm().item():.2e}")
    assert not wrong, f"{len(wrong)} of {len(want)} gradients differ:\n" + "\n".join(wrong[:12])


def record_layers(model: nn.Module, into: list[Tensor]) -> list[Any]:
    """Hooks that append every decoder layer's output, bottom first."""
    return [
        layer.register_forward_hook(lambda m, a, out: into.append(tensor_of(out).detach().clone()))
        for layer in layers_of(model)
    ]


def all_listed(lists: Any) -> list[list[list[int]]]:
    """First rows of each key head's and query block's key blocks, of a lemo.kernels.block_lists.BlockLists."""
    return _by_list(lists, lists.listed)


def all_boosts(lists: Any) -> list[list[list[float]]] | None:
    """Logarithms of their weights to base 2; None where all are 1."""
    return None if lists.boost is None else _by_list(lists, lists.boosts)


def _by_list(lists: Any, values: Callable[[Tensor, Tensor], Tensor]) -> list[list[list[Any]]]:
    counts = lists.grid.count.tolist()
    slots = torch.arange(max(counts), device=lists.grid.device)
    query = torch.arange(len(counts), device=lists.grid.device)[:, None]
    found = values(query, slots).tolist()
    return [[row[:count] for row, count in zip(head, counts, strict=True)] for head in found]
