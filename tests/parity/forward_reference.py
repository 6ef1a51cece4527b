"""The masked-dense reference of `forward` mode, and plain scores (paper, equations 1-2).

Shapes: B batch, T tokens, H query heads, d head size. A row is an index into the flattened B·T tokens.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reference import (
    allowed_mask,
    blocks_of,
    explicit_masks,
    hooks,
    record_layers,
    row_mask,
    tensor_of,
)
from tiny import Batch, causal_lm, layers_of, mlp_down_module, mlp_output_module, window_of

Plans = dict[tuple[int, str], set[int]]


def real_rows(batch: Batch) -> set[int]:
    """Rows that belong to a document."""
    return {row for document in batch.documents for row in document}


@dataclass
class ForwardRun:
    """What a masked-dense forward saw: per layer queries and keys [B, H, T, d], positions applied and
    queries scaled, the MLP's activity [B·T, neurons], the layers' outputs, and the loss (with its graph)."""

    queries: list[Tensor]
    keys: list[Tensor]
    activity: list[Tensor]
    outputs: list[Tensor]
    loss: Tensor


def masked_dense(
    model: nn.Module,
    batch: Batch,
    plans: Plans,
    maps: dict[tuple[int, str], tuple[Tensor, Tensor, Tensor]] | None = None,
    seen: list[Tensor] | None = None,
    **call: Any,
) -> ForwardRun:
    """Run unmodified modules with the plans' blocks left out: in attention, dropped rows are no keys and add
    nothing to the residual; in the MLP they add nothing. A branch without a plan is dense. With `maps`, (A, B, bias)
    of a layer's branch, dropped rows add B A x + bias, x being the branch's input. `seen` takes the masks' place."""
    layers, everything = layers_of(model), real_rows(batch)
    attention = [plans.get((i, "attention"), everything) for i in range(len(layers))]
    mlp = [plans.get((i, "mlp"), everything) for i in range(len(layers))]
    captured: dict[tuple[int, str], Any] = {}
    outputs: list[Tensor] = []

    entered: dict[tuple[int, str], Tensor] = {}

    def zero(key: tuple[int, str], rows: set[int]) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            tensor = tensor_of(output)
            mask = row_mask(rows, batch, tensor.dtype).view(*tensor.shape[:-1], 1)
            masked = tensor * mask
            if maps is not None:
                a, b, bias = maps[key]
                masked = masked + (1 - mask) * (entered[key].view(tensor.shape) @ a.T @ b.T + bias)
            return (masked, *output[1:]) if isinstance(output, tuple) else masked

        return hook

    def enter(key: tuple[int, str]) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            entered[key] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        return hook

    def capture(key: tuple[int, str]) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            captured[key] = tensor_of(output).detach()

        return hook

    def capture_input(key: tuple[int, str]) -> Any:
        def hook(module: nn.Module, args: tuple) -> None:
            captured[key] = args[0].detach()

        return hook

    def capture_rope(key: tuple[int, str]) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            captured[key] = kwargs.get("position_embeddings")

        return hook

    handles = explicit_masks(model, batch, attention, seen)
    for i, layer in enumerate(layers):
        heads = layer.self_attn
        handles += [
            heads.register_forward_pre_hook(enter((i, "attention")), with_kwargs=True),
            (layer.mlp if hasattr(layer, "mlp") else layer.fc1).register_forward_pre_hook(
                enter((i, "mlp")), with_kwargs=True
            ),
            heads.register_forward_hook(zero((i, "attention"), attention[i])),
            mlp_output_module(layer).register_forward_hook(zero((i, "mlp"), mlp[i])),
            getattr(heads, "q_norm", heads.q_proj).register_forward_hook(capture((i, "q"))),
            getattr(heads, "k_norm", heads.k_proj).register_forward_hook(capture((i, "k"))),
            mlp_down_module(layer).register_forward_pre_hook(capture_input((i, "activity"))),
            heads.register_forward_pre_hook(capture_rope((i, "rope")), with_kwargs=True),
        ]
    handles += record_layers(model, outputs)
    with hooks(handles):
        loss = model(**batch.inputs(), **call).loss
    run = ForwardRun([], [], [], outputs, loss)
    B, T = batch.input_ids.shape
    for i, layer in enumerate(layers):
        heads = layer.self_attn
        query = captured[(i, "q")].reshape(B, T, -1, heads.head_dim).transpose(1, 2)
        key = captured[(i, "k")].reshape(B, T, -1, heads.head_dim).transpose(1, 2)
        if captured[(i, "rope")] is not None:
            module = importlib.import_module(type(causal_lm(model)).__module__)
            query, key = module.apply_rotary_pos_emb(query, key, *captured[(i, "rope")])
        run.queries.append(query * heads.scaling)
        run.keys.append(key.repeat_interleave(query.shape[1] // key.shape[1], dim=1))
        run.activity.append(captured[(i, "activity")].reshape(B * T, -1))
    return run


def informativeness(query: Tensor, key: Tensor, batch: Batch, window: int | None) -> Tensor:
    """Equation 1: A_ij [B, T, T], mean over heads of relu(q_i·k_j), zero where i may not see j."""
    A = torch.relu(query.double() @ key.double().transpose(-1, -2)).mean(1)
    seen = allowed_mask(batch, window)[:, 0]
    return torch.where(seen, A, torch.zeros_like(A))


def softmax_mass(query: Tensor, key: Tensor, batch: Batch, window: int | None) -> Tensor:
    """Mean over heads of the attention weights, [B, T, T]."""
    seen = allowed_mask(batch, window)
    return (query.double() @ key.double().transpose(-1, -2)).masked_fill(~seen, -math.inf).softmax(-1).mean(1)


def attention_scores(A: Tensor, batch: Batch, document: list[int], block_size: int, score: str) -> list[float]:
    """One score for each of the document's blocks: equation 2, its causal variant, or the softmax mass."""
    T = batch.input_ids.shape[1]
    matrix = A[document[0] // T].tolist()
    blocks = [[row % T for row in block] for block in blocks_of(document, block_size)]
    n = len(blocks)
    if score == "mass":
        given = [[sum(matrix[i][j] for i in own for j in other) / len(own) for other in blocks] for own in blocks]
        return [sum(row[J] for row in given) / n for J in range(n)]
    S = [
        [max(matrix[i][j] for i in blocks[I] for j in blocks[J]) if J <= I else 0.0 for J in range(n)] for I in range(n)
    ]
    if score == "paper":
        return [sum(S[I][J] for I in range(J, n)) / n for J in range(n)]
    return [math.inf] + [sum(S[J - 1][K] for K in range(J)) / J for J in range(1, n)]


def mlp_scores(activity: Tensor, document: list[int], block_size: int, score: str) -> list[float]:
    """Mean absolute activity of each block; in the causal variant that of the block before."""
    own = [activity[block].double().abs().mean().item() for block in blocks_of(document, block_size)]
    return [math.inf, *own[:-1]] if score == "causal" else own


def chosen_blocks(scores: list[float], *, keep: float | None = None, threshold: float | None = None) -> set[int]:
    """Blocks of one document that take part; the first and the last always do (DESIGN 4.6)."""
    n = len(scores)
    always = {0, n - 1}
    if threshold is not None:
        return always | {i for i in range(n) if scores[i] >= threshold}
    assert keep is not None
    count = math.ceil(keep * n)
    rest = sorted((i for i in range(n) if i not in always), key=lambda i: -scores[i])
    return always | set(rest[: max(0, count - len(always))])


def layer_scores(
    run: ForwardRun, model: nn.Module, batch: Batch, branch: str, layer: int, block_size: int, score: str
) -> list[list[float]]:
    """Scores of every document's blocks in one branch of one layer."""
    if branch == "mlp":
        return [mlp_scores(run.activity[layer], d, block_size, score) for d in batch.documents]
    pairs = softmax_mass if score == "mass" else informativeness
    A = pairs(run.queries[layer], run.keys[layer], batch, window_of(model, layer))
    return [attention_scores(A, batch, d, block_size, score) for d in batch.documents]


def expected_rows(scores: list[list[float]], batch: Batch, block_size: int, **rule: Any) -> set[int]:
    """Rows that take part, given each document's scores."""
    kept: set[int] = set()
    for document, values in zip(batch.documents, scores, strict=True):
        blocks = blocks_of(document, block_size)
        kept.update(row for i in chosen_blocks(values, **rule) for row in blocks[i])
    return kept
