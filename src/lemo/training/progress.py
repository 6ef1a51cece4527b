"""What a person sees while a run goes on: a bar on a terminal, a line a step elsewhere; always on stderr."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class StepDisplay:
    """Shows loss, tokens/s, keep and peak memory of each step.

    Args:
        steps: of the whole run.
        done: steps already made by an earlier process.
        console: where to write.
    """

    def __init__(self, steps: int, done: int, console: Console) -> None:
        self.steps = steps
        self.console = console
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=console,
            )
            self._task = self._bar.add_task("training", total=steps, completed=done, figures="")
            self._bar.start()

    def show(self, record: dict[str, Any]) -> None:
        """A step's line of `metrics.jsonl`."""
        density = "" if record["density"] is None else f"density {record['density']:.2f}  "
        figures = (
            f"loss {record['loss']:.4f}  {record['tokens_per_s']:,.0f} tokens/s  "
            f"keep {record['keep_mean']:.2f}  {density}peak {record['peak_gib']:.2f} GiB"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], figures=figures)
        else:
            self.console.print(f"step {record['step']}/{self.steps}  {figures}", highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
