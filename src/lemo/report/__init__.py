"""What came out, as one page with nothing loaded from anywhere else.

path = lemo.report.build(Path("runs/default"))  # a run of `lemo finetune`
path = lemo.report.build_quality(Path("runs/quality"))  # records of `lemo bench quality`
"""

from __future__ import annotations

from pathlib import Path

from lemo.report.page import build

__all__ = ["build", "build_quality", "holds_records"]


def holds_records(source: Path) -> bool:
    """Whether `build_quality` is meant: a file, or a directory of records that isn't that of a run."""
    from lemo.training.metrics import FILE as METRICS

    if not source.is_dir():
        return source.is_file()
    return any(file.name != METRICS for file in source.glob("*.jsonl"))


def build_quality(source: Path, output: Path | None = None) -> Path:
    """`lemo.report.quality.build_quality`, imported when first used, because records need torch."""
    from lemo.report import quality

    return quality.build_quality(source, output)
