"""Held-out loss equals transformers' own; completions and gradient agreement leave nothing behind."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lemo.models
from lemo.config import Attend, Segments, SparsityConfig
from lemo.errors import UserError
from lemo.evaluation import evaluate, gradient_agreement, sample_completion
from tiny import VOCAB, build, causal_lm, make_batch

T = 24


def rows(count: int = 5, *, labelled: int = 9, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    out = []
    for index in range(count):
        n = T - 2 * index
        ids = torch.randint(3, VOCAB, (n,), generator=generator).tolist()
        out.append({"input_ids": ids, "labels": [-100] * (n - labelled) + ids[n - labelled :], "name": f"d{index}"})
    return out


def collate(examples: list[Any]) -> dict[str, Tensor]:
    (row,) = examples
    return {key: torch.tensor([row[key]]) for key in ("input_ids", "labels", "position_ids") if key in row}


def run(model: nn.Module, dataset: list[dict[str, Any]], collator: Any = collate, **kwargs: Any) -> Any:
    settings: dict[str, Any] = {"documents": 100, "buckets": 4, "device": "cpu", "max_tokens": T}
    return evaluate(model, dataset, collator, **(settings | kwargs))


def hf_loss(model: nn.Module, batch: dict[str, Tensor]) -> float:
    with torch.no_grad():
        return model(**batch, use_cache=False).loss.item()


class FakeTokenizer:
    """Ids as text: enough to see which tokens were decoded."""

    pad_token_id = 0
    eos_token_id = 2

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(map(str, ids))


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "opt-350m"])
def test_loss_of_single_rows_equals_transformers(family: str) -> None:
    model = build(family).eval()
    dataset = rows()
    result = run(model, dataset)
    losses = [hf_loss(model, collate([row])) for row in dataset]
    assert [document.name for document in result.documents] == [row["name"] for row in dataset]
    assert [document.tokens for document in result.documents] == [9] * 5
    assert [document.loss for document in result.documents] == pytest.approx(losses, rel=1e-6)
    assert result.tokens == 45
    assert result.loss == pytest.approx(sum(losses) / 5, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.loss))


def test_the_mean_is_over_tokens_not_documents() -> None:
    model = build("llama").eval()
    dataset = [*rows(1, labelled=20), *rows(1, labelled=2, seed=1)]
    losses = [hf_loss(model, collate([row])) for row in dataset]
    assert run(model, dataset).loss == pytest.approx((20 * losses[0] + 2 * losses[1]) / 22, rel=1e-6)


@pytest.mark.parametrize("name", ["right", "left", "packed", "packed2"])
def test_padded_and_packed_batches_equal_transformers(name: str) -> None:
    model = build("llama").eval()
    batch = make_batch(name)
    inputs = {k: v for k, v in batch.inputs().items() if isinstance(v, Tensor)}
    result = run(model, [{}], lambda _rows: inputs, max_tokens=64)
    assert result.tokens == batch.label_count()
    assert result.loss == pytest.approx(hf_loss(model, inputs), rel=1e-6)


@pytest.mark.parametrize("name", ["plain", "right", "left", "packed", "packed2"])
def test_positions_count_from_each_documents_first_token(name: str) -> None:
    """Buckets agree with the reference: full logits, one position at a time."""
    model = build("llama").eval()
    batch = make_batch(name)
    inputs = {k: v for k, v in batch.inputs().items() if isinstance(v, Tensor)}
    with torch.no_grad():
        log_p = model(**inputs, use_cache=False).logits.log_softmax(-1).flatten(0, 1)
    labels = batch.labels.flatten().tolist()
    per_position: dict[int, list[float]] = {}
    for document in batch.documents:
        for position, row in enumerate(document):
            if position > 0 and labels[row] != -100:
                per_position.setdefault(position, []).append(-log_p[row - 1, labels[row]].item())
    buckets = 7
    result = run(model, [{}], lambda _rows: inputs, max_tokens=43, buckets=buckets)
    assert [b.start for b in result.by_position] == [43 * i // buckets for i in range(buckets)]
    assert [b.end for b in result.by_position] == [43 * (i + 1) // buckets for i in range(buckets)]
    for bucket in result.by_position:
        expected = [x for p, losses in per_position.items() if bucket.start <= p < bucket.end for x in losses]
        assert bucket.tokens == len(expected)
        if expected:
            assert bucket.loss == pytest.approx(sum(expected) / len(expected), rel=1e-5)
        else:
            assert bucket.loss is None


def test_result_is_json_and_counts_documents() -> None:
    model = build("llama")
    result = run(model, rows(), documents=2)
    assert len(result.documents) == 2
    restored = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert restored["documents"][0] == {"name": "d0", "tokens": 9, "loss": result.documents[0].loss}
    assert restored["by_position"][-1].keys() == {"start", "end", "tokens", "loss"}
    assert sum(bucket["tokens"] for bucket in restored["by_position"]) == restored["tokens"] == 18


def test_a_row_over_max_tokens_stretches_the_last_bucket() -> None:
    result = run(build("llama"), rows(1), max_tokens=10, buckets=2)
    assert (result.by_position[-1].start, result.by_position[-1].end) == (5, T)
    assert result.by_position[-1].tokens == 9


def test_an_unlabelled_document_counts_nothing() -> None:
    dataset = [rows(1)[0] | {"labels": [-100] * T}, *rows(1)]
    model = build("llama")
    result = run(model, dataset)
    assert result.documents[0].loss is None
    assert result.documents[0].tokens == 0
    assert result.loss == pytest.approx(run(model, rows(1)).loss, rel=1e-12)


def test_evaluation_is_dense_and_restores_modes() -> None:
    """A sparsified model in train mode, LoRA dropout on, evaluates as the unmodified one, and goes on training."""
    plain = build("llama", lora_dropout=0.5).eval()
    model = copy.deepcopy(plain).train()
    frozen = causal_lm(model).model.layers[1].eval()
    lemo.models.sparsify(model, SparsityConfig(mode="forward", keep=0.3, block_size=4))
    before = {name: module.training for name, module in model.named_modules()}
    assert run(model, rows()) == run(plain, rows())
    assert {name: module.training for name, module in model.named_modules()} == before
    assert model.training
    assert not frozen.training


def test_no_logits_of_the_whole_sequence() -> None:
    model = build("llama")
    seen: list[int] = []
    causal_lm(model).lm_head.register_forward_hook(lambda _m, inputs, _out: seen.append(inputs[0].shape[0]))
    run(model, rows(2))
    assert seen == [9, 9]


@pytest.mark.parametrize(
    ("dataset", "kwargs", "message"),
    [
        ([], {}, "no held-out documents"),
        ([rows(1)[0] | {"labels": [-100] * T}], {}, "none of the 1 held-out documents"),
        (rows(1), {"buckets": T + 1}, "evaluation.buckets"),
    ],
)
def test_what_the_user_can_fix(dataset: list[dict[str, Any]], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(build("llama"), dataset, **kwargs)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="documents >= 1"):
        run(build("llama"), rows(), documents=0)


@pytest.mark.parametrize("sparse", [False, True])
def test_completion_continues_the_prompt_greedily(sparse: bool) -> None:
    model = build("llama")
    (row,) = rows(1, labelled=9)
    prompt = torch.tensor([row["input_ids"][: T - 9]])
    expected = prompt
    model.eval()
    with torch.no_grad():
        for _ in range(5):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
            if expected[0, -1] == 2:
                break
    model.train()
    if sparse:
        lemo.models.sparsify(model, SparsityConfig(mode="forward", keep=0.3, block_size=4))
    state = torch.get_rng_state()
    sample = sample_completion(model, FakeTokenizer(), row, 5)
    assert sample == {
        "prompt_tail": " ".join(map(str, row["input_ids"][: T - 9])),
        "reference": " ".join(map(str, row["input_ids"][T - 9 : T - 4])),
        "completion": " ".join(map(str, expected[0, T - 9 :].tolist())),
    }
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_completion_where_every_token_is_labelled_and_where_documents_are_packed() -> None:
    model = build("llama")
    (row,) = rows(1, labelled=T)
    sample = sample_completion(model, FakeTokenizer(), row, 6)
    assert sample["reference"] == " ".join(map(str, row["input_ids"][-6:]))
    packed = row | {"position_ids": [*range(10), *range(T - 10)], "labels": [-100] * 7 + row["input_ids"][7:]}
    sample = sample_completion(model, FakeTokenizer(), packed, 6)
    assert sample["prompt_tail"] == " ".join(map(str, row["input_ids"][:7]))
    assert sample["reference"] == " ".join(map(str, row["input_ids"][7:10]))
    with pytest.raises(ValueError, match="n_tokens >= 1"):
        sample_completion(model, FakeTokenizer(), row, 0)


def training_batch(**kwargs: Any) -> dict[str, Any]:
    return {k: v for k, v in make_batch("plain", **kwargs).inputs().items() if isinstance(v, Tensor)}


def reference_agreement(model: nn.Module, other: nn.Module, batch: dict[str, Any]) -> tuple[float, float]:
    """Cosine and norm ratio of `model`'s gradient against `other`'s."""
    flat = []
    for each in (model, other):
        each.zero_grad()
        each(**batch).loss.backward()
        flat.append(torch.cat([p.grad.flatten() for p in each.parameters() if p.grad is not None]).double())
    return torch.cosine_similarity(*flat, dim=0).item(), (flat[0].norm() / flat[1].norm()).item()


def test_agreement_is_that_of_the_unmodified_models_gradient() -> None:
    plain = build("llama")
    model = lemo.models.sparsify(copy.deepcopy(plain), SparsityConfig(fidelity=0.5, labelled="ranked", block_size=4))
    batch = training_batch(label_all=True)
    found = gradient_agreement(model, batch)
    cosine, ratio = reference_agreement(model, plain, batch)
    assert found["cosine"] == pytest.approx(cosine, rel=1e-5)
    assert found["norm_ratio"] == pytest.approx(ratio, rel=1e-5)
    assert 0.1 < found["cosine"] < 0.999


@pytest.mark.parametrize(
    "config",
    [
        SparsityConfig(fidelity=1.0, block_size=4),
        SparsityConfig(policy="segments", segments=Segments(spans=2, drawn=2), block_size=4),
        SparsityConfig(mode="forward", keep=1.0, dense_share=0.5, block_size=4),
    ],
)
def test_agreement_is_perfect_when_everything_is_kept(config: SparsityConfig) -> None:
    """Under dropout too: both passes see the same masks, whatever else is drawn."""
    model = lemo.models.sparsify(build("llama", lora_dropout=0.3 if config.mode == "backward" else 0.0), config)
    found = gradient_agreement(model, training_batch(label_all=True))
    assert found["cosine"] == pytest.approx(1.0, abs=1e-6)
    assert found["norm_ratio"] == pytest.approx(1.0, abs=1e-6)


def test_a_pass_that_would_run_dense_is_compared_all_the_same() -> None:
    attend = Attend(density=0.5, block=2)
    segments = Segments(spans=4, drawn=1)
    config = SparsityConfig(policy="segments", segments=segments, block_size=4, attend=attend, dense_share=0.5)
    model = lemo.models.sparsify(build("llama"), config)
    for seed in range(6):
        torch.manual_seed(seed)
        assert gradient_agreement(model, training_batch(label_all=True))["cosine"] < 0.9999


@pytest.mark.parametrize("sparsity", ["energy", "segments", "forward"])
def test_agreement_leaves_nothing_behind(sparsity: str) -> None:
    """Gradients, random states, statistics and modes are as before, also when it fails half-way."""
    config = {
        "energy": SparsityConfig(fidelity=0.7, labelled="ranked", block_size=4),
        "segments": SparsityConfig(policy="segments", segments=Segments(spans=4, drawn=1), block_size=4),
        "forward": SparsityConfig(mode="forward", keep=0.5, block_size=4),
    }[sparsity]
    model = lemo.models.sparsify(build("llama", lora_dropout=0.3), config)
    runtime = lemo.models.get_runtime(model)
    batch = training_batch(label_all=True)
    model(**batch).loss.backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    identities = {name: id(p.grad) for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    statistics = copy.deepcopy(runtime)
    model.eval()
    found = gradient_agreement(model, batch)
    assert -1 <= found["cosine"] < 0.9999
    assert not model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: id(p.grad) for name, p in model.named_parameters()} == identities
    for name, p in model.named_parameters():
        assert (p.grad is None) == (gradients[name] is None)
        assert p.grad is None or torch.equal(p.grad, gradients[name])
    with pytest.raises(RuntimeError, match="boom"):
        _fail_inside(model, batch)
    assert runtime.last_spans == statistics.last_spans
    assert runtime.collect() == statistics.collect()
    assert not runtime.dense_only


def _fail_inside(model: nn.Module, batch: dict[str, Any]) -> None:
    def boom(*_args: Any) -> None:
        raise RuntimeError("boom")

    handle = causal_lm(model).lm_head.register_forward_hook(boom)
    try:
        gradient_agreement(model, batch)
    finally:
        handle.remove()


def test_agreement_needs_a_sparsified_model_and_labels() -> None:
    batch = training_batch()
    with pytest.raises(ValueError, match="isn't sparsified"):
        gradient_agreement(build("llama"), batch)
    model = lemo.models.sparsify(build("llama"), SparsityConfig())
    with pytest.raises(ValueError, match="no labels"):
        gradient_agreement(model, batch | {"labels": torch.full_like(batch["labels"], -100)})
