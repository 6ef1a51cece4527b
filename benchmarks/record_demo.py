"""Records a finished run directory of `make demo`: `python -m benchmarks.record_demo runs/demo-1`.

The row is added to `results/<device>/<date>_demo.jsonl`, of which the README shows a table. Run it on the machine and
at the commit of the run.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from benchmarks.table import RESULTS
from lemo.bench.records import Record, read, write
from lemo.bench.runs import WARM_UP
from lemo.config_io import SAVED_CONFIG, load_config
from lemo.training.metrics import MetricsLog

METHODS = {"dense": "lora+ckpt", "backward": "lemo-backward"}
COPIED = ("seed", "steps", "peak_gib", "peak_reserved_gib", "loss_before", "loss_after", "versions")


def record_of(run: Path) -> Record:
    """A finished run directory as a row; steps of the warm-up are left out of the times."""
    config = load_config(run / SAVED_CONFIG)
    summary = json.loads((run / "summary.json").read_text())
    step_ms = [1000 * line["step_s"] for line in MetricsLog(run).read()[WARM_UP:]]
    row = Record("step", METHODS[summary["mode"]], config.model.name, task="sft", setting="default")
    row.T, row.batch = config.data.max_tokens, config.training.batch_size
    row.keep, row.fidelity = summary["keep_mean"], summary["fidelity_mean"]
    row.step_ms, row.step_ms_min, row.step_ms_max = statistics.median(step_ms), min(step_ms), max(step_ms)
    row.tokens_per_s = 1000 * row.T * row.batch / row.step_ms
    row.command = "make demo"
    for key in COPIED:
        setattr(row, key, summary[key])
    return row


if __name__ == "__main__":
    found = record_of(Path(sys.argv[1]))
    folder = found.gpu.lower().replace(" ", "-").replace("(", "").replace(")", "")
    path = RESULTS / folder / f"{found.time[:10]}_demo.jsonl"
    write([*(read(path) if path.exists() else []), found], path)
