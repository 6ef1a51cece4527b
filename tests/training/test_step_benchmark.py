"""`lemo bench step`: rows, resuming, memory that runs out, forced placements, and what is refused."""

from __future__ import annotations

import importlib.util
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lemo.bench import records, shapes, step
from lemo.bench.liger import liger_kernels
from lemo.bench.placements import KeepPlacement, Placements
from lemo.bench.step_config import StepConfig, load_step
from lemo.errors import UserError
from lemo.models import get_runtime
from tiny import build

OPT_FILE = Path(__file__).parents[2] / "benchmarks" / "step" / "forward_opt.yaml"
SPREAD = {
    "method": "lemo-backward",
    "setting": "spread 0.5",
    "placement": "spread",
    "keep": 0.5,
    "sparsity": {"block_size": 8},
}


def benchmark(output: Path, **changes: Any) -> StepConfig:
    values = {
        "shapes": [{"name": "smollm2-135m", "layers": 1}],
        "lengths": [64],
        "labels": 8,
        "repeats": 2,
        "warm_up": 0,
        "dtype": "float32",
        "device": "cpu",
        "methods": [{"method": "lora+ckpt"}, SPREAD],
        "output": str(output),
    }
    return StepConfig.model_validate(values | changes)


def test_a_stopped_benchmark_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = step.run_steps(benchmark(tmp_path / "b", methods=[{"method": "lora+ckpt"}]))
    assert [(r.method, r.shape, r.T, r.steps) for r in first] == [("lora+ckpt", "smollm2-135m", 64, 2)]
    row = first[0]
    assert row.step_ms_min <= row.step_ms <= row.step_ms_max
    assert row.tokens_per_s == pytest.approx(64_000 / row.step_ms)
    assert row.keep == 1.0
    assert row.details["layers"] == 1
    assert row.details["full_depth"] == 30
    measured = []
    whole = step._measure
    monkeypatch.setattr(step, "_measure", lambda c, p, m, d: measured.append(m.setting) or whole(c, p, m, d))
    rows = step.run_steps(benchmark(tmp_path / "b"), resume=True)
    assert measured == ["spread 0.5"]
    assert rows[0] == row
    assert rows[1].keep == 0.5
    assert rows == records.read(tmp_path / "b" / "records.jsonl")


def test_queries_that_see_some_blocks(tmp_path: Path) -> None:
    attend = {"density": 0.3, "block": 4, "labelled": "dense"}
    methods = [
        {"method": "lora+ckpt"},
        {"method": "lemo-attend", "sparsity": {"mode": "dense", "attend": {"density": 0.3, "block": 4}}},
        SPREAD | {"method": "lemo-backward+attend", "sparsity": {"block_size": 8, "attend": attend}},
    ]
    dense, all_rows, kept = step.run_steps(benchmark(tmp_path / "b", methods=methods))
    assert dense.density is None
    assert 0.2 < all_rows.density < 0.4
    # The last query block sees everything.
    assert all_rows.density < kept.density < 0.8
    assert (all_rows.keep, kept.keep) == (1.0, 0.5)
    assert all_rows.details["tflop"] < dense.details["tflop"]
    assert {row.task for row in (dense, all_rows, kept)} == {"sft"}


def test_every_token_labelled(tmp_path: Path) -> None:
    (few,) = step.run_steps(benchmark(tmp_path / "few", methods=[{"method": "lora+ckpt"}]))
    (row,) = step.run_steps(benchmark(tmp_path / "all", labels="all", methods=[{"method": "lora+ckpt"}]))
    assert row.task == "lm"
    assert row.details["tflop"] - few.details["tflop"] == pytest.approx((63 - 8) * 4 * 576 * 49152 / 1e12)


def test_memory_that_runs_out_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = step._measure

    def full(config: Any, place: Any, method: Any, device: str) -> Any:
        if method.method == "lora+ckpt":
            raise torch.OutOfMemoryError("no room")
        return whole(config, place, method, device)

    monkeypatch.setattr(step, "_measure", full)
    rows = step.run_steps(benchmark(tmp_path / "b"))
    assert [(r.method, r.step_ms is None, r.details["out_of_memory"]) for r in rows] == [
        ("lora+ckpt", True, True),
        ("lemo-backward", False, False),
    ]


def test_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    step.run_steps(benchmark(tmp_path / "b", methods=[SPREAD]))
    with pytest.raises(UserError, match="labels differ from the benchmark"):
        step.run_steps(benchmark(tmp_path / "b", labels=4), resume=True)
    with pytest.raises(UserError, match=r"lemo-backward spread 0\.5 differ"):
        step.run_steps(benchmark(tmp_path / "b", methods=[SPREAD | {"keep": 0.25}]), resume=True)
    with pytest.raises(UserError, match="go on with the benchmark"):
        step.run_steps(benchmark(tmp_path / "b"))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x").touch()
    with pytest.raises(UserError, match="holds no benchmark"):
        step.run_steps(benchmark(tmp_path / "c"), resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": [{"method": "lemo-backward"}]}, "sparsity belongs to the lemo methods"),
        ({"methods": [SPREAD | {"keep": None}]}, "keep goes together with placement spread"),
        (
            {"methods": [SPREAD | {"sparsity": {"policy": "segments"}}]},
            "needs sparsity.mode backward",
        ),
        ({"methods": [{"method": "lemo-attend", "sparsity": {"mode": "dense"}}]}, "sparsity.attend belongs to"),
        ({"methods": [SPREAD | {"sparsity": {"attend": {}}}]}, "sparsity.attend belongs to"),
        ({"methods": [SPREAD | {"method": "lemo-attend", "sparsity": {"mode": "dense", "attend": {}}}]}, "placement"),
        ({"methods": [SPREAD, SPREAD]}, "two rows are lemo-backward"),
        ({"methods": [{"method": "lemo-forward", "sparsity": {}}]}, "needs sparsity.mode forward and no calibration"),
        ({"methods": [{"method": "longlora", "sparsity": {}}]}, "sparsity belongs to"),
        ({"methods": [{"method": "lora", "groups": 4}]}, "groups belong to longlora"),
        ({"methods": [SPREAD | {"placement": "recorded"}]}, "placement recorded needs placements"),
        ({"labels": 64}, "labels .64. must be fewer"),
        ({"shapes": [{"name": "smollm2-135m"}, {"name": "smollm2-135m"}]}, "two shapes are smollm2-135m"),
    ],
)
def test_mistakes(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        benchmark(tmp_path, **changes)


def test_parts_of_a_step(tmp_path: Path) -> None:
    dense, sparse = step.run_steps(benchmark(tmp_path / "b", parts=True))
    assert dense.details is not None
    assert sparse.details is not None
    whole, parts = dense.details["parts_ms"], sparse.details["parts_ms"]
    assert {"rest attention", "rest linears", "loss linears", "optimizer other"} <= set(whole)
    named = {f"{name} {kind}" for name in ("forward", "recompute", "backward") for kind in ("attention", "linears")}
    assert named | {"selection other", "keys and values linears", "compensation other"} <= set(parts)
    # What operations are counted for is timed too.
    assert set(sparse.details["parts_tflop"]) <= set(parts)
    assert all(ms > 0 for ms in (*whole.values(), *parts.values()))


FORWARD = {"setting": "keep 0.5", "sparsity": {"mode": "forward", "keep": 0.5, "block_size": 8}}
METHODS: list[dict[str, Any]] = [
    {"method": "lora"},
    {"method": "lora+logits"},
    {"method": "longlora"},
    {"method": "lemo-forward", **FORWARD},
    {"method": "lemo-forward+ckpt", **FORWARD},
]


def test_forward_and_its_baselines(tmp_path: Path) -> None:
    rows = step.run_steps(benchmark(tmp_path / "b", methods=METHODS, labels="all"))
    assert [(r.method, r.keep, r.task) for r in rows] == [
        ("lora", 1.0, "lm"),
        ("lora+logits", 1.0, "lm"),
        ("longlora", 1.0, "lm"),
        ("lemo-forward", 0.5, "lm"),
        ("lemo-forward+ckpt", 0.5, "lm"),
    ]
    lora, _, longlora, sparse, checkpointed = (r.details or {} for r in rows)
    assert lora["labels"] == 63
    assert longlora["tflop"] < lora["tflop"]
    assert sparse["tflop"] < checkpointed["tflop"] < lora["tflop"]
    assert checkpointed["stored_gib"] < sparse["stored_gib"] < lora["stored_gib"] / 2
    assert sparse["moved_gb"] < lora["moved_gb"]


@pytest.mark.parametrize(("shape", "embedding"), [("opt-1.3b", 32), ("opt-350m", 24)])
def test_opts_benchmark_at_a_small_size(
    shape: str, embedding: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"hidden_size": 32, "ffn_dim": 48, "num_attention_heads": 4, "vocab_size": 97}
    monkeypatch.setitem(shapes.SHAPES, shape, shapes.SHAPES[shape] | small | {"word_embed_proj_dim": embedding})
    overrides = [f"shapes=[{{name: {shape}, layers: 2}}]", "lengths=[512]", "warm_up=0", "repeats=1", "dtype=float32"]
    config = load_step(OPT_FILE, output=str(tmp_path / "b"), device="cpu", overrides=overrides)
    model = step.wrapped(config, step.Place(shape, 2, 512), config.methods[0], "cpu")
    decoder = model.get_base_model().model.decoder
    assert decoder.embed_positions.num_embeddings == 512 + 2
    assert (decoder.project_in is None) == (embedding == 32)
    assert decoder.layers[0].do_layer_norm_before == (shape == "opt-1.3b")
    rows = step.run_steps(config)
    assert [(r.method, r.keep) for r in rows] == [
        ("lora", 1.0),
        ("longlora", 1.0),
        ("lemo-forward", 0.5),
        ("lemo-forward", 0.25),
    ]
    stored = [(r.details or {})["stored_gib"] for r in rows]
    assert stored[3] < stored[2] < stored[0] == stored[1]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m["method"])
def test_a_method_is_what_its_name_says(method: dict[str, Any], tmp_path: Path) -> None:
    config = benchmark(tmp_path / "b", methods=[method], labels="all", lora={"targets": ["q_proj", "o_proj"]})
    model = step.wrapped(config, step.Place("smollm2-135m", 2, 64), config.methods[0], "cpu")
    batch = step.sequence(64, model.config.vocab_size, config.labelled(64), "cpu")
    assert (batch["labels"][0] == -100).tolist() == [True] + [False] * 63
    runtime = get_runtime(model)
    assert (runtime is None) == (method["method"] == "lora+logits")
    model(**batch).loss.backward()
    assert (model.config._attn_implementation == "sdpa") == (method["method"] != "longlora")
    trained = {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "o_proj"}
    if method["method"].startswith("lemo-forward"):
        assert runtime is not None
        assert runtime.predictors.keys() == {(i, b) for i in (0, 1) for b in ("attention", "mlp")}
        assert all(plan.keep == 0.5 for plan in runtime.last_plans.values())


@pytest.mark.parametrize("fails", [False, True])
def test_models_made_after_ligers_row_are_transformers_own(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger replaces classes in transformers' module, which the next row's model would be made of."""
    from transformers.models.llama import modeling_llama as module

    names = ("LlamaMLP", "LlamaRMSNorm", "apply_rotary_pos_emb")
    own = {name: getattr(module, name) for name in names}

    def replace(model: Any) -> None:
        for name in names:
            setattr(module, name, object())
        if fails:
            raise RuntimeError("no such kernel")

    liger = SimpleNamespace(_apply_liger_kernel_to_instance=replace)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(transformers=liger))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    with pytest.raises(RuntimeError) if fails else nullcontext(), liger_kernels(build("llama")):
        assert all(getattr(module, name) is not own[name] for name in names)
    assert all(getattr(module, name) is own[name] for name in names)


def test_liger_is_refused_where_it_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lora\+ckpt\+liger needs"):
        step.run_steps(benchmark(tmp_path / "b", methods=[{"method": "lora+ckpt+liger"}]))
    assert not (tmp_path / "b").exists()


def test_trl_trains_the_same_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trl = pytest.importorskip("trl")
    methods = [{"method": "lora+ckpt"}, {"method": "trl"}]
    config = benchmark(tmp_path / "b", methods=methods, warm_up=1, lora={"targets": ["q_proj", "o_proj"]})
    model = step.wrapped(config, step.Place("smollm2-135m", 1, 64), config.methods[0], "cpu")
    ours = model(**step.sequence(64, model.config.vocab_size, 8, "cpu")).loss.item()
    seen: list[tuple[float, bool, set[str], set[torch.dtype]]] = []
    whole = trl.SFTTrainer.training_step

    def training_step(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = whole(self, model, *args, **kwargs)
        trained = {name.split(".")[-4]: p.dtype for name, p in model.named_parameters() if p.requires_grad}
        recomputes = model.get_base_model().model.layers[0].gradient_checkpointing
        seen.append((loss.item(), recomputes, set(trained), set(trained.values())))
        return loss

    monkeypatch.setattr(trl.SFTTrainer, "training_step", training_step)
    baseline, row = step.run_steps(config)
    assert (row.method, row.steps, row.keep, row.task) == ("trl", 2, 1.0, "sft")
    assert len(seen) == 3
    assert "trl" in row.versions
    assert "trl" not in baseline.versions
    # B starts at zero, so the first loss is the model's.
    assert seen[0][0] == pytest.approx(ours, rel=1e-5)
    assert seen[2][0] < seen[0][0]
    assert all(how == [True, {"q_proj", "o_proj"}, {torch.float32}] for _, *how in seen)
    assert row.details is not None
    assert baseline.details is not None
    for key in ("tflop", "stored_gib", "moved_gb"):
        assert row.details[key] == baseline.details[key]


@pytest.mark.parametrize(("method", "missing"), [("trl", "trl"), ("trl+liger", "liger_kernel")])
def test_trl_is_refused_where_it_cannot_run(
    method: str, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found(name))
    with pytest.raises(UserError, match=f"^{re.escape(method)} needs"):
        step.run_steps(benchmark(tmp_path / "b", methods=[{"method": "lora+ckpt"}, {"method": method}]))
    assert not (tmp_path / "b").exists()


def recording(tmp_path: Path) -> Path:
    layers = ((1.0, 0.0), (0.5, 0.5), (0.0, 1.0))
    kept = KeepPlacement(keep=0.5, work=0.4, layers=layers)
    path = tmp_path / "recorded.json"
    values: Any = {"model": "m", "tokens": 64, "labels": 8, "sequences": 1, "commit": "c", "placements": (kept,)}
    path.write_text(Placements(**values).model_dump_json())
    return path


def test_a_recorded_placement_is_kept_layer_by_layer(tmp_path: Path) -> None:
    method = SPREAD | {"placement": "recorded", "sparsity": {"block_size": 1}}
    config = benchmark(tmp_path / "b", placements=str(recording(tmp_path)), methods=[method])
    place = step.Place("smollm2-135m", 2, 64)
    model = step.wrapped(config, place, config.methods[0], "cpu")
    model(**step.sequence(64, model.config.vocab_size, 8, "cpu")).loss.backward()
    runtime = get_runtime(model)
    assert runtime is not None
    rows = [set(runtime.last_plans[layer, "mlp"].host_rows.tolist()) for layer in (0, 1)]
    # 64 tokens, of which 55 to 62 predict labels, and 32 are kept: all others in the first, then in the second half.
    labelled = set(range(55, 63))
    assert [len(one) for one in rows] == [32, 32]
    assert all(labelled <= one for one in rows)
    assert all(row < 28 for row in rows[0] - labelled)
    assert all(row >= 28 for row in rows[1] - labelled)


def test_unusable_recordings_are_refused_before_any_work(tmp_path: Path) -> None:
    path = recording(tmp_path)
    method = SPREAD | {"placement": "recorded", "keep": 0.25}
    with pytest.raises(UserError, match=r"keep 0\.25 isn't in the recording, which has 0\.5"):
        step.run_steps(benchmark(tmp_path / "b", placements=str(path), methods=[method]))
    for text, message in (("{}", "not a recording"), (None, "check the path")):
        path.write_text(text) if text else path.unlink()
        with pytest.raises(UserError, match=message):
            step.run_steps(benchmark(tmp_path / "b", placements=str(path), methods=[method]))
    assert not (tmp_path / "b").exists()
