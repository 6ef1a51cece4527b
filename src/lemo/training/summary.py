"""`summary.json`: a run in one object, computed from `metrics.jsonl` so that a resumed run counts every step once."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from platform import python_version
from typing import Any

FILE = "summary.json"
_PACKAGES = ("lemo", "torch", "transformers", "peft", "accelerate", "triton")


@dataclass(frozen=True)
class Summary:
    """A finished run.

    Attributes:
        mode: `SparsityConfig.mode`.
        model: its name.
        steps: optimizer steps.
        tokens, labelled_tokens: real tokens trained on, and those that entered the loss; over all ranks.
        loss_before, loss_after: held-out loss of the dense model (nats per labelled token); None without evaluation.
        keep_mean: mean share of tokens kept, over steps, layers and branches.
        fidelity_mean: mean fidelity over steps and layers; None where the mode has none.
        density_mean: mean share of causal attention computed in the forward; None where queries see everything.
        tokens_per_s: real tokens a second, over all steps but the first, which warms up.
        peak_gib, peak_reserved_gib: largest of the steps' peaks (`lemo.memory.PeakMemory` says what is measured).
        seed: `training.seed`.
        versions: of Python and the packages that matter.
        device: name of the device.
        processes: ranks that trained together.
        data: what became of every document (`DataReport.as_dict`).
        heldout_documents: how many were evaluated.
        by_position: buckets of positions with their losses before and after.
        sample: prompt_tail, reference, before, after; None if no sample was asked for.
        gradient_agreement: policy `segments`: cosine and norm_ratio of its gradient to the dense one; else None.
        wall_s: seconds of the process that finished the run, evaluation included.
    """

    mode: str
    model: str
    steps: int
    tokens: int
    labelled_tokens: int
    loss_before: float | None
    loss_after: float | None
    keep_mean: float
    fidelity_mean: float | None
    density_mean: float | None
    tokens_per_s: float
    peak_gib: float
    peak_reserved_gib: float | None
    seed: int
    versions: dict[str, str]
    device: str
    processes: int
    data: dict[str, Any]
    heldout_documents: int
    by_position: list[dict[str, Any]]
    sample: dict[str, str] | None
    gradient_agreement: dict[str, float] | None
    wall_s: float

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    def headline(self) -> str:
        """The run in one line."""
        loss = ""
        if self.loss_before is not None and self.loss_after is not None:
            loss = f", held-out loss {self.loss_before:.4f} -> {self.loss_after:.4f}"
        density = "" if self.density_mean is None else f", density {self.density_mean:.3f}"
        return (
            f"{self.mode}: {self.steps} steps, {self.tokens:,} tokens at {self.tokens_per_s:,.0f} tokens/s, "
            f"keep {self.keep_mean:.3f}{density}, peak {self.peak_gib:.2f} GiB{loss}"
        )


def totals(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The part of a summary that the steps determine.

    Args:
        records: the lines of `metrics.jsonl`, at least one.
    """
    timed = records[1:] or records
    fidelities = [record["fidelity_mean"] for record in records if record["fidelity_mean"] is not None]
    # Lines of before the attend axis have no density.
    densities = [record["density"] for record in records if record.get("density") is not None]
    reserved = [record["peak_reserved_gib"] for record in records if record["peak_reserved_gib"] is not None]
    return {
        "steps": len(records),
        "tokens": sum(record["tokens"] for record in records),
        "labelled_tokens": sum(record["labelled_tokens"] for record in records),
        "keep_mean": statistics.fmean(record["keep_mean"] for record in records),
        "fidelity_mean": statistics.fmean(fidelities) if fidelities else None,
        "density_mean": statistics.fmean(densities) if densities else None,
        "tokens_per_s": sum(record["tokens"] for record in timed) / sum(record["step_s"] for record in timed),
        "peak_gib": max(record["peak_gib"] for record in records),
        "peak_reserved_gib": max(reserved) if reserved else None,
    }


def versions(*more: str) -> dict[str, str]:
    """Versions of Python and of the installed packages that decide a run's numbers, and of `more` packages."""
    found = {"python": python_version()}
    for package in (*_PACKAGES, *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # triton is on machines with a GPU only
    return found
