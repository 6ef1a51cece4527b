"""Run directories made of invented numbers, for the tests of the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lemo.config import RunConfig
from lemo.config_io import save_resolved

SAMPLE = {
    "prompt_tail": "    def __enter__(self):\n        return self\n\n    def __exit__(self, *args):\n",
    "reference": "        self.close()\n\n    def close(self):\n        if self.file:\n            self.file.flush()\n",
    "before": "        self.__exit__(*args)\n        return self\n        return self\n        return self\n",
    "after": "        self.close()\n\n    def close(self):\n        self._file.close()\n        self._file = None\n",
}


def step(number: int, *, layers: int, steps: int, mode: str = "backward", cuda: bool = False) -> dict[str, Any]:
    """One line of metrics.jsonl; everything is a smooth function of step and layer."""
    keep = [
        [
            a := 0.15 + 0.25 * (layer / layers) ** 2 + 0.05 * math.sin(number + layer),
            a if mode == "backward" else 0.8 * a,
        ]
        for layer in range(layers)
    ]
    fidelity = [0.985 - 0.004 * math.sin(layer + number) if mode == "backward" else None for layer in range(layers)]
    known = [value for value in fidelity if value is not None]
    return {
        "step": number,
        "loss": 1.55 + 0.25 * math.exp(-4 * number / steps) + 0.12 * math.sin(7.3 * number),
        "lr": 5e-4 * (1 - number / steps),
        "grad_norm": 0.4 + 0.1 * math.cos(number),
        "tokens": 4096,
        "labelled_tokens": 512,
        "tokens_per_s": 180 + 5 * math.sin(number),
        "step_s": 22.7,
        "peak_gib": 2.4 + 0.001 * number,
        "peak_reserved_gib": 3.1 if cuda else None,
        "keep": keep,
        "keep_mean": sum(sum(pair) for pair in keep) / (2 * layers),
        "fidelity": fidelity,
        "fidelity_mean": sum(known) / len(known) if known else None,
    }


def summary(*, steps: int, mode: str = "backward", sample: dict[str, str] | None = SAMPLE) -> dict[str, Any]:
    """A summary.json to go with it."""
    part = {
        "found": 812, "empty": 3, "not_taken": 0, "tokens_read": 3_100_000,
        "dropped_short": {"documents": 520, "tokens": 800_000}, "dropped_long": {"documents": 0, "tokens": 0},
        "truncated": {"documents": 289, "tokens": 1_116_256}, "split": {"documents": 0, "tokens": 0}, "pieces": 0,
        "documents": 289, "sequences": 289, "packed_rows": None, "tokens": 1_183_744, "labelled_tokens": 147_968,
        "labels_lost": 0, "whole_labelled": 0, "lengths": {"min": 4096, "p50": 4096, "p90": 4096, "max": 4096},
    }  # fmt: skip
    return {
        "mode": mode,
        "model": "smollm2-135m-instruct",
        "steps": steps,
        "tokens": 4096 * steps,
        "labelled_tokens": 512 * steps,
        "loss_before": 1.6931,
        "loss_after": 1.6172,
        "keep_mean": 0.234,
        "fidelity_mean": 0.985 if mode == "backward" else None,
        "tokens_per_s": 181.4,
        "peak_gib": 2.43,
        "peak_reserved_gib": None,
        "seed": 0,
        "versions": {"python": "3.11.7", "lemo": "0.1.0", "torch": "2.13.0"},
        "device": "cpu",
        "processes": 1,
        "data": {"train": part, "heldout": part, "notes": ["1 file isn't UTF-8 & was left out"]},
        "heldout_documents": 8,
        "by_position": [
            {"start": 512 * i, "end": 512 * (i + 1), "tokens": 4096, "before": 1.9 - 0.03 * i, "after": 1.78 - 0.03 * i}
            for i in range(8)
        ],
        "sample": sample,
        "wall_s": 724.2,
    }


def write_run(
    directory: Path,
    *,
    steps: int = 25,
    layers: int = 30,
    mode: str = "backward",
    finished: bool = True,
    cuda: bool = False,
    **changes: Any,
) -> Path:
    """A run directory.

    Args:
        directory: made here.
        finished: whether there is a summary.
        changes: keys of the summary to replace.
    """
    directory.mkdir(parents=True)
    sparsity: dict[str, Any] = {"mode": mode} | ({"keep": 0.25} if mode == "forward" else {})
    settings = {"sparsity": sparsity, "training": {"steps": steps if finished else 2 * steps}}
    save_resolved(RunConfig.model_validate(settings), directory / "config.yaml")
    lines = [json.dumps(step(n, layers=layers, steps=steps, mode=mode, cuda=cuda)) for n in range(1, steps + 1)]
    (directory / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    if finished:
        text = json.dumps(summary(steps=steps, mode=mode) | changes, indent=2)
        (directory / "summary.json").write_text(text + "\n")
    return directory
