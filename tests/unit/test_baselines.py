"""LongLoRA's shifted attention against masks of size T·T and eager softmax; sequences cut short."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

import lemo
from lemo.bench import baselines
from lemo.bench.baselines import shift_attention, truncate_rows, unshift_attention
from lemo.errors import UserError
from reference import assert_same_gradients, gradients, hooks
from tiny import VOCAB, WINDOW, build, causal_lm, layers_of, make_batch

GROUPS = 4
NINE_HEADS = {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped": ("llama", {}),
    "nine-heads": ("llama", NINE_HEADS),
    "opt": ("opt", {}),
}


def plain_inputs(T: int, rows: int = 1) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (rows, T), generator=torch.Generator().manual_seed(T))
    return {"input_ids": ids, "labels": ids.clone()}


def shifted_mask(H: int, T: int, groups: int) -> Tensor:
    """Additive [1, H, T, T]: 0 where a head's query (third) sees a key (fourth), else the smallest number."""
    size = math.ceil(T / groups)
    allowed = torch.zeros(1, H, T, T, dtype=torch.bool)
    for head in range(H):
        shift = 0 if head < H // 2 else size - size // 2
        for query in range(T):
            for key in range(query + 1):
                allowed[0, head, query, key] = (query + shift) // size == (key + shift) // size
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


def masked_eager(model: nn.Module, T: int, groups: int) -> list[Any]:
    """Hooks that hand an eager model the shifted masks; no batch or architecture needs another."""
    mask = shifted_mask(causal_lm(model).config.num_attention_heads, T, groups)

    def replace(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | {"attention_mask": mask}

    return [layer.self_attn.register_forward_pre_hook(replace, with_kwargs=True) for layer in layers_of(model)]


@pytest.mark.parametrize("T", [1, 3, 8, 18, 43])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_equal_masked_eager(name: str, T: int) -> None:
    """In fp64: where a query sees one key, gradients of q and k are zero, and fp32's rounding is all there is."""
    family, sizes = MODELS[name]
    shifted = build(family, **sizes).double()
    eager = build(family, attention="eager", **sizes).double()
    shift_attention(shifted, GROUPS)
    inputs = plain_inputs(T, rows=2)
    weights = torch.randn(2, T, VOCAB, dtype=torch.float64)
    with hooks(masked_eager(eager, T, GROUPS)):
        want = eager(**inputs, use_cache=False).logits
    got = shifted(**inputs, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    (want * weights).sum().backward()
    (got * weights).sum().backward()
    assert_same_gradients(gradients(shifted), gradients(eager))


def test_the_mask_of_the_reference_is_the_papers() -> None:
    """Two groups of four: one head in [0-3] [4-7], the other in [0-1] [2-5] [6-7]."""
    plain, moved = (shifted_mask(2, 8, 2)[0] == 0).int().sum(-1).tolist()
    assert plain == [1, 2, 3, 4, 1, 2, 3, 4]
    assert moved == [1, 2, 1, 2, 3, 4, 1, 2]


def test_evaluation_is_the_unmodified_model() -> None:
    model = build("llama")
    batches = [make_batch(name).inputs() for name in ("plain", "left", "packed2")]
    model.eval()
    want = [model(**batch).logits for batch in batches]
    shift_attention(model)
    for batch, logits in zip(batches, want, strict=True):
        assert torch.equal(model(**batch).logits, logits)


def test_undone() -> None:
    model = build("llama")
    inputs = plain_inputs(43)
    want = model(**inputs).logits
    shift_attention(model)
    assert not torch.allclose(model(**inputs).logits, want)
    unshift_attention(model)
    assert torch.equal(model(**inputs).logits, want)
    with pytest.raises(ValueError, match="isn't shifted"):
        unshift_attention(model)


def test_models_do_not_share_their_groups() -> None:
    models = [build("llama") for _ in range(3)]
    inputs = plain_inputs(40)
    for model, groups in zip(models, (1, 2, 4), strict=True):
        shift_attention(model, groups)
    logits = [model(**inputs).logits for model in models]
    assert not torch.allclose(logits[1], logits[2])
    halves = copy.deepcopy(models[1])
    assert torch.equal(halves(**inputs).logits, logits[1])


@pytest.mark.parametrize("sparsify_first", [True, False])
def test_under_sparsify_with_checkpointing(sparsify_first: bool) -> None:
    plain = build("llama", **NINE_HEADS)
    checkpointed = copy.deepcopy(plain)
    shift_attention(plain)
    if not sparsify_first:
        shift_attention(checkpointed)
    lemo.sparsify(checkpointed, lemo.SparsityConfig(mode="dense"))
    if sparsify_first:
        shift_attention(checkpointed)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs = plain_inputs(43)
    want = plain(**inputs).loss
    want.backward()
    got = checkpointed(**inputs).loss
    got.backward()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert_same_gradients(gradients(checkpointed), gradients(plain))


def test_autocast() -> None:
    model = build("llama")
    shift_attention(model)
    exact = model(**plain_inputs(43)).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(**plain_inputs(43))
    low.loss.backward()
    assert (low.logits.float() - exact).norm() < 0.05 * exact.norm()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.parametrize("token", [1, 20, 42])
def test_no_output_sees_a_later_token(token: int) -> None:
    model = build("llama")
    shift_attention(model)
    inputs = plain_inputs(43)
    before = model(**inputs).logits
    inputs["input_ids"][0, token] = 3 + (inputs["input_ids"][0, token] - 2) % (VOCAB - 3)
    after = model(**inputs).logits
    assert torch.equal(before[0, :token], after[0, :token])
    assert not torch.equal(before[0, token], after[0, token])


def test_no_mask_is_built_for_a_plain_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    shift_attention(model)
    masks: list[Any] = []
    check = baselines._refuse_other_than_plain
    monkeypatch.setattr(
        baselines,
        "_refuse_other_than_plain",
        lambda module, mask, *rest: (masks.append(mask), check(module, mask, *rest)),
    )
    model(**plain_inputs(43), attention_mask=torch.ones(1, 43))
    assert masks == [None] * 3


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", ["left", "right", "packed", "packed2"])
def test_padding_and_packing_are_refused(name: str, cache: bool) -> None:
    model = build("llama")
    shift_attention(model)
    with pytest.raises(UserError, match=r"unpadded.*batch_size=1"):
        model(**make_batch(name).inputs() | {"use_cache": cache})


@pytest.mark.parametrize("family", ["mistral", "qwen2-window"])
def test_a_window_is_refused_where_it_cuts(family: str) -> None:
    model = build(family)
    shift_attention(model)
    assert model(**plain_inputs(WINDOW - 1)).loss.isfinite()
    with pytest.raises(UserError, match="window"):
        model(**plain_inputs(43))


def test_models_that_cannot_be_shifted() -> None:
    with pytest.raises(ValueError, match="is eager"):
        shift_attention(build("llama", attention="eager"))
    model = build("llama")
    with pytest.raises(ValueError, match="at least 1"):
        shift_attention(model, 0)
    shift_attention(model)
    with pytest.raises(ValueError, match="is lemo_shifted_4"):
        shift_attention(model)
    sparse = lemo.sparsify(build("llama"), lemo.SparsityConfig())
    with pytest.raises(ValueError, match="needs sparsity mode dense without attend, this model's is backward"):
        shift_attention(sparse)


def rows(*labelled: tuple[int, int], T: int = 100) -> Dataset:
    """Rows of T tokens; each is labelled from one token to another."""
    values = list(range(1000, 1000 + T))
    return Dataset.from_list(
        [
            {
                "input_ids": values,
                "labels": [token if first <= t < end else -100 for t, token in enumerate(values)],
                "name": f"row {index}",
            }
            for index, (first, end) in enumerate(labelled)
        ]
    )


@pytest.mark.parametrize(
    ("first", "keep", "kept"),
    [(90, 0.25, 25), (60, 0.25, 41), (60, 0.41, 41), (51, 0.1, 50), (99, 0.01, 2), (90, 1.0, 100)],
)
def test_a_labelled_tail_stays_whole(first: int, keep: float, kept: int) -> None:
    (row,) = truncate_rows(rows((first, 100)), keep, seed=0)
    assert row["input_ids"] == list(range(1100 - kept, 1100))
    assert [label for label in row["labels"] if label != -100] == list(range(1000 + first, 1100))
    assert row["labels"][0] == -100
    assert row["name"] == "row 0"


def test_a_random_stretch_where_every_token_is_labelled() -> None:
    train = rows(*[(1, 100)] * 40)
    cut = truncate_rows(train, 0.25, seed=0)
    assert cut.features == train.features
    starts = [row["input_ids"][0] - 1000 for row in cut]
    for row, start in zip(cut, starts, strict=True):
        assert row["input_ids"] == list(range(1000 + start, 1025 + start))
        assert row["labels"] == [-100, *row["input_ids"][1:]]
    assert len(set(starts)) > 20
    assert min(starts) < 10
    assert 65 < max(starts) <= 75
    assert truncate_rows(train, 0.25, seed=0)[:] == cut[:]
    assert truncate_rows(train, 0.25, seed=1)[:] != cut[:]
    assert truncate_rows(train, 1.0, seed=0)[:] == train[:]


@pytest.mark.parametrize("labelled", [(100, 100), (1, 2)])
def test_rows_left_without_a_label_are_refused(labelled: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="row 0: no label is left in the 10 tokens kept of 100"):
        truncate_rows(rows(labelled), 0.1, seed=0)
