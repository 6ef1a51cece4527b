"""The README's measured table, generated from the records: `python -m benchmarks.table` rewrites it in place."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.records import RESULTS, read

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"


def demo_table(results: Path = RESULTS) -> str:
    """Markdown: the demo's job by device, length and method; medians over seeds, every figure from a record."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for path in sorted(results.glob("*/*_demo.jsonl")):
        for row in read(path):
            groups.setdefault((row["gpu"], row["T"], row["steps"], row["method"]), []).append(row)
    lines = [
        "| device | T | steps | method | seeds | keep | fidelity | step, ms (min to max) | peak GiB | held-out loss "
        "before → after | gain retained (range) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (gpu, T, steps, method), rows in groups.items():
        gains = [row["gain_retained"] for row in rows if row["gain_retained"] is not None]
        gain = f"{statistics.mean(gains):.0%}" if gains else "n/a"
        if len(gains) > 1 and min(gains) != max(gains):
            gain += f" ({min(gains):.0%} to {max(gains):.0%})"
        fidelity = rows[0]["fidelity"]
        lines.append(
            f"| {gpu} | {T:,} | {steps} | `{method}` | {len(rows)} | {mean(rows, 'keep'):.2f} | "
            f"{'n/a' if fidelity is None else format(mean(rows, 'fidelity'), '.3f')} | "
            f"{statistics.median(row['step_ms'] for row in rows):,.0f} ({min(row['step_ms_min'] for row in rows):,.0f} "
            f"to {max(row['step_ms_max'] for row in rows):,.0f}) | {max(row['peak_gib'] for row in rows):.2f} | "
            f"{mean(rows, 'loss_before'):.3f} → {mean(rows, 'loss_after'):.3f} | {gain} |"
        )
    return "\n".join(lines)


def mean(rows: list[dict[str, Any]], key: str) -> float:
    """Mean of one key over rows."""
    return statistics.mean(row[key] for row in rows)


def replaced(text: str, table: str) -> str:
    """The README's text with the table between its markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(replaced(README.read_text(), demo_table()))
