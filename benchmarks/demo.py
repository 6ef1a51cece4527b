"""The demo's job at a chosen length, sparse and dense, in one process: what a user of `lemo finetune` gets.

    python -m benchmarks.demo --tokens 8192 --steps 40 --seeds 0 1 2

Rows: `lora+ckpt` (PEFT LoRA, gradient checkpointing, segmented loss: the strong baseline), `lemo-backward` with the
default settings. Gain retained is against the baseline's row of
the same seed. One warm-up step of each method is left out of the times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.records import RESULTS, Record, write
from lemo.config import RunConfig
from lemo.config_io import load_config
from lemo.training.job import finetune
from lemo.training.metrics import MetricsLog

WARM_UP = 3
METHODS: dict[str, dict[str, object]] = {
    "lora+ckpt": {"mode": "dense"},
    "lemo-backward": {"mode": "backward"},
}


def job(method: str, tokens: int, steps: int, seed: int, output: Path) -> RunConfig:
    """The demo's configuration with this method, length and seed."""
    base = load_config().model_dump()
    base["sparsity"] = METHODS[method]
    base["data"] |= {"max_tokens": tokens, "min_tokens": tokens, "heldout_share": 0.2}
    base["training"] |= {"steps": steps, "seed": seed, "save_every": 0, "learning_rate": 5e-4, "warmup_steps": 2}
    base["evaluation"] |= {"documents": 16, "sample_tokens": 0}
    base["output"] = str(output)
    return RunConfig.model_validate(base)


def record_of(run: Path, setting: str = "default") -> Record:
    """A finished run directory as a row, made on this machine."""
    config = load_config(run / "config.yaml")
    summary = json.loads((run / "summary.json").read_text())
    step_ms = [1000 * line["step_s"] for line in MetricsLog(run).read()[WARM_UP:]]
    tokens, batch = config.data.max_tokens, config.training.batch_size
    return Record(
        bench="step",
        method=next(name for name, sparsity in METHODS.items() if sparsity["mode"] == summary["mode"]),
        model=config.model.name,
        task="sft",
        T=tokens,
        batch=batch,
        keep=summary["keep_mean"],
        fidelity=summary["fidelity_mean"],
        setting=setting,
        seed=summary["seed"],
        steps=summary["steps"],
        step_ms=statistics.median(step_ms),
        step_ms_min=min(step_ms),
        step_ms_max=max(step_ms),
        tokens_per_s=1000 * tokens * batch / statistics.median(step_ms),
        peak_gib=summary["peak_gib"],
        peak_reserved_gib=summary["peak_reserved_gib"],
        loss_before=summary["loss_before"],
        loss_after=summary["loss_after"],
        versions=summary["versions"],
    )


def measure(method: str, tokens: int, steps: int, seed: int) -> Record:
    """Runs one job and turns its run directory into a row."""
    with tempfile.TemporaryDirectory() as folder:
        config = job(method, tokens, steps, seed, Path(folder) / "run")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        finetune(config)
        return record_of(Path(config.output))


def default_output(record: Record) -> Path:
    """Where a row goes unless said otherwise."""
    folder = record.gpu.lower().replace(" ", "-").replace("(", "").replace(")", "")
    return RESULTS / folder / f"{record.time[:10]}_demo.jsonl"


def main() -> None:
    """Measures every method with every seed; prints a table and appends the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--output", type=Path, help="JSONL file; default: in benchmarks/results/<device>/")
    parser.add_argument("--commit", help="commit to record where the tree isn't a checkout")
    parser.add_argument("--run", type=Path, help="record this finished run directory of `make demo`, run nothing")
    arguments = parser.parse_args()

    if arguments.run is not None:
        record = record_of(arguments.run)
        record.command, record.commit = "make demo", arguments.commit or record.commit
        write([record], arguments.output or default_output(record))
        return

    seeds, methods = " ".join(map(str, arguments.seeds)), " ".join(arguments.methods)
    command = f"python -m benchmarks.demo --tokens {arguments.tokens} --steps {arguments.steps} --seeds {seeds}"
    command += f" --methods {methods}"
    records: list[Record] = []
    for seed in arguments.seeds:
        dense_gain: float | None = None
        for method in arguments.methods:
            record = measure(method, arguments.tokens, arguments.steps, seed)
            record.command, record.commit = command, arguments.commit or record.commit
            if record.loss_before is not None and record.loss_after is not None:
                gain = record.loss_before - record.loss_after
                dense_gain = gain if method == "lora+ckpt" else dense_gain
                record.gain_retained = gain / dense_gain if dense_gain else None
            records.append(record)
            write([record], arguments.output or default_output(record))
    for r in records:
        print(
            f"{r.method:14} seed {r.seed} keep {r.keep:.3f} step {r.step_ms:8.1f} ms [{r.step_ms_min:.1f}, "
            f"{r.step_ms_max:.1f}] {r.tokens_per_s:8.0f} tok/s peak {r.peak_gib:.2f} GiB loss {r.loss_before:.4f} -> "
            f"{r.loss_after:.4f} gain retained {r.gain_retained}"
        )


if __name__ == "__main__":
    main()
