"""What came out, as one page with nothing loaded from anywhere else.

path = lemo.report.build(Path("runs/default"))  # a run of `lemo finetune`
path = lemo.report.build_records(Path("runs/quality"))  # records of `lemo bench`
path = lemo.report.build_calibration(Path("runs/calibration"))  # what `lemo calibrate` wrote
"""

from __future__ import annotations

from pathlib import Path

from lemo.config_io import CALIBRATION_FACTS
from lemo.report.page import build

__all__ = ["build", "build_calibration", "build_records", "holds_calibration", "holds_records"]


def holds_calibration(source: Path) -> bool:
    """Whether a directory is that of a calibration."""
    return (source / CALIBRATION_FACTS).is_file()


def build_calibration(directory: Path) -> Path:
    """Writes the report of a calibration; an older one is replaced.

    Raises:
        UserError: a damaged calibration, or no space to write.
    """
    from lemo.report import calibration

    return calibration.build_calibration(directory)


def holds_records(source: Path) -> bool:
    """Whether `build_records` is meant: a file, or a directory of records that isn't that of a run."""
    from lemo.training.metrics import FILE as METRICS

    if not source.is_dir():
        return source.is_file()
    return any(file.name != METRICS for file in source.glob("*.jsonl"))


def build_records(source: Path, output: Path | None = None) -> Path:
    """Writes the report of benchmark records, of a quality study, training steps or operations; replaces an older one.

    Args:
        source: a JSONL file of records, or a directory that holds some.
        output: file to write; by default `report.html` in the directory, or beside the file with its name.

    Raises:
        UserError: no record to report there, a damaged one, or no space to write.
    """
    from lemo.bench.records import read
    from lemo.report import ops, quality, step
    from lemo.report.page import write_page

    rows = [row for file in quality.record_paths(source) for row in read(file)]
    steps, lines = step.groups(rows), ops.op_lines(rows)
    if any(row.bench == "quality" for row in rows) or not (steps or lines):
        html = quality.quality_page(rows, source)
    else:
        html = step.render(steps, rows) if steps else ops.render_ops(lines)
    return write_page(html, source, output)
