"""Turns finished calibrations into records: one row for the whole, one for each branch of each layer.

`python -m benchmarks.record_calibration DIRECTORY... FILE.jsonl`. Run it on the machine that calibrated: rows carry its
device.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lemo.bench import records
from lemo.bench.records import Record
from lemo.models.calibration import Facts, read_calibration
from lemo.training.summary import versions


def rows_of(facts: Facts) -> list[Record]:
    """A calibration's rows; `recall` is that of half of the blocks, by predicted against exact scores."""
    settings = facts.settings
    knobs = (
        f"{settings['allocation']}, keep {settings['keep']:g}, {settings['branches']}, {facts.score}, "
        f"bypass {settings['bypass_rank']}, rank {settings['predictor']['rank']}, "
        f"size {settings['predictor']['size']:g}, {settings['predictor']['head_steps']} steps"
    )

    def row(setting: str) -> Record:
        return Record(
            bench="calibration",
            method="lemo-forward",
            model=facts.model,
            T=settings["data"]["max_tokens"],
            setting=setting,
            seed=settings["seed"],
            versions=versions(),
        )

    branches = facts.branches.values()
    judged = [recall for branch in branches for recall in branch.recall]
    kept = [recall for branch in branches for recall in branch.recall_kept]
    whole = row(knobs)
    whole.keep, whole.wall_s = facts.average_keep, facts.seconds
    whole.loss_before, whole.loss_after_sparse = facts.loss_dense, facts.loss_sparse
    whole.recall = sum(judged) / len(judged)
    whole.details = {
        "lowest_recall": min(judged),
        "recall_kept": sum(kept) / len(kept),
        "loss_uniform": facts.loss_uniform,
        "size_share": sum(sum(b.size) for b in branches) / sum(sum(b.first_size) for b in branches),
        "tokens": facts.tokens,
        "judged_tokens": facts.judged_tokens,
    }
    found = [whole]
    for branch, values in facts.branches.items():
        for layer in range(len(values.keep)):
            one = row(f"{knobs}: layer {layer}, {branch}")
            one.keep, one.recall = values.keep[layer], values.recall[layer]
            one.details = {
                "recall_kept": values.recall_kept[layer],
                "cost_of_half": values.cost[layer],
                "size": values.size[layer],
                "first_size": values.first_size[layer],
                "explained": values.explained[layer] if values.explained else None,
            }
            found.append(one)
    return found


if __name__ == "__main__":
    *directories, file = sys.argv[1:]
    records.write([row for d in directories for row in rows_of(read_calibration(Path(d)).facts)], Path(file))
