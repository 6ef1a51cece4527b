"""The low-rank bypass of `forward` mode: the masked-dense reference with maps, and the fit to the branches' outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forward_reference import masked_dense
from pairs import config, pair, rows_of_plans, step
from torch import Tensor

import lemo
from lemo.models import fit_bypasses, get_runtime
from lemo.models.surgery import BYPASSES
from reference import assert_same_gradients, assert_same_hidden, gradients, hooks, record_layers
from tiny import CASES, FAMILIES, Batch, build, layers_of, make_batch


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    """What the fit takes; packed documents are fitted as one."""
    call = batch.inputs()
    return {name: call[name] for name in ("input_ids", "attention_mask") if name in call}


def fitted(sparse: Any, batch: Batch, rank: int = 5) -> dict[tuple[int, str], tuple[Tensor, Tensor, Tensor]]:
    """Maps of every branch, (A, B, bias)."""
    fit_bypasses(sparse, [inputs_of(batch)], rank=rank)
    runtime = get_runtime(sparse)
    assert runtime is not None
    assert set(runtime.bypasses) == {(i, b) for i in range(3) for b in ("attention", "mlp")}
    return {key: (one.a, one.b, one.bias) for key, one in runtime.bypasses.items()}


@pytest.mark.parametrize(("family", "name"), CASES)
def test_equals_masked_dense_with_maps(family: str, name: str, device: torch.device) -> None:
    dense, sparse = pair(family, device, config(mode="forward", keep=0.5))
    batch = make_batch(name, device, label_all=True)
    maps = fitted(sparse, batch)
    outputs: list[Tensor] = []
    with hooks(record_layers(sparse, outputs)):
        loss, got = step(sparse, batch)
    runtime = get_runtime(sparse)
    assert runtime is not None
    # Windows are cut on the host.
    asked = [layer for (layer, _), plan in runtime.last_plans.items() if "host_rows" in vars(plan)]
    assert not asked or family in ("mistral", "qwen2-window"), "a wait for the device"
    want = masked_dense(dense, batch, rows_of_plans(sparse), maps)
    want.loss.backward()
    without = masked_dense(dense, batch, rows_of_plans(sparse)).loss
    real = batch.real_mask()
    for mine, theirs in zip(outputs, want.outputs, strict=True):
        assert_same_hidden(mine[real], theirs[real])
    torch.testing.assert_close(loss, want.loss.detach(), rtol=1e-6, atol=0)
    assert_same_gradients(got, gradients(dense))
    assert abs(loss - without) > 1e-3, "the maps change nothing: the test shows nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_fits_what_the_branches_put_out(family: str, device: torch.device) -> None:
    """At full rank the map is the least-squares fit of the branch's output on its input, padding left out."""
    model = build(family, device)
    batches = [make_batch("left", device), make_batch("plain", device, seed=9)]
    seen: dict[str, list[Tensor]] = {"x": [], "y": []}
    attention = layers_of(model)[1].self_attn

    def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen["x"].append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
        seen["y"].append(output[0])

    with hooks([attention.register_forward_hook(note, with_kwargs=True)]), torch.no_grad():
        for batch in batches:
            model.eval()(**inputs_of(batch))
    real = [batch.real_mask() for batch in batches]
    x, y = (torch.cat([t[m] for t, m in zip(seen[k], real, strict=True)]).double() for k in ("x", "y"))
    ones = torch.ones(len(x), 1, dtype=torch.float64, device=x.device)
    best = torch.linalg.lstsq(torch.cat([x, ones], 1), y, driver="gelsd" if x.device.type == "cpu" else None).solution
    error = (y - torch.cat([x, ones], 1) @ best).square().sum()

    sparse = lemo.sparsify(model.train(), config(mode="forward", keep=0.5))
    explained = fit_bypasses(sparse, [inputs_of(batch) for batch in batches], rank=32)
    assert sparse.training
    runtime = get_runtime(sparse)
    assert runtime is not None
    ours = (y - runtime.bypasses[1, "attention"](x)).square().sum()
    spread = (y - y.mean(0)).square().sum()
    # The ridge costs a little.
    assert error <= ours * (1 + 1e-9)
    assert ours <= error + 0.02 * spread
    assert explained[1, "attention"] == pytest.approx(float(1 - ours / spread), abs=0.02)


def test_restore_takes_them_away_and_checkpointing_keeps_them(device: torch.device) -> None:
    dense, sparse = pair("llama", device, config(mode="forward", keep=0.5))
    batch = make_batch("right", device)
    maps = fitted(sparse, batch)
    keys = set(sparse.state_dict())
    sparse.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss, got = step(sparse, batch)
    want = masked_dense(dense, batch, rows_of_plans(sparse), maps)
    want.loss.backward()
    torch.testing.assert_close(loss, want.loss.detach(), rtol=1e-6, atol=0)
    assert_same_gradients(got, gradients(dense))
    assert set(lemo.restore(sparse).state_dict()) == keys == set(dense.state_dict())
    assert get_runtime(sparse) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_they_train_if_asked(family: str, device: torch.device) -> None:
    dense, sparse = pair(family, device, config(mode="forward", keep=0.5, train_bypass=True))
    batch = make_batch("plain", device, label_all=True)
    maps = {key: tuple(t.detach().clone().requires_grad_() for t in ts) for key, ts in fitted(sparse, batch).items()}
    loss, got = step(sparse, batch)
    want = masked_dense(dense, batch, rows_of_plans(sparse), maps)
    want.loss.backward()
    torch.testing.assert_close(loss, want.loss.detach(), rtol=1e-6, atol=0)
    mine = {name.partition(f"{BYPASSES}.")[2]: got.pop(name) for name in list(got) if BYPASSES in name}
    assert_same_gradients(got, gradients(dense))
    theirs = {
        f"{layer}_{branch}.{part}": t.grad
        for (layer, branch), ts in maps.items()
        for part, t in zip(("a", "b", "bias"), ts, strict=True)
    }
    assert_same_gradients(mine, theirs)
    assert not any(BYPASSES in name for name in lemo.restore(sparse).state_dict())


def test_frozen_bypasses_that_should_train_are_an_error(device: torch.device) -> None:
    model = lemo.sparsify(build("llama", device).train(), config(mode="forward", keep=0.5, train_bypass=True))
    batch = make_batch("plain", device)
    with pytest.raises(ValueError, match="no bypasses to train"):
        model(**batch.inputs())
    fit_bypasses(model, [inputs_of(batch)], rank=5)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"wrap the model in PEFT before lemo\.sparsify"):
        model(**batch.inputs())


def test_mistakes(device: torch.device) -> None:
    model = build("llama", device)
    batch = inputs_of(make_batch("plain", device))
    with pytest.raises(ValueError, match="belong to mode forward"):
        fit_bypasses(model, [batch])
    lemo.sparsify(model, config(mode="forward", keep=0.5))
    with pytest.raises(ValueError, match="got no batches"):
        fit_bypasses(model, [])
    with pytest.raises(ValueError, match=r"rank must lie in 1 \.\.\. 32"):
        fit_bypasses(model, [batch], rank=33)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
