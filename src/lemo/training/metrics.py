"""`metrics.jsonl`: one JSON object a line and optimizer step, each step exactly once, also after a crash."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from lemo.errors import UserError
from lemo.training.storage import storage_errors, write_text

FILE = "metrics.jsonl"


class MetricsLog:
    """The steps of one run directory.

    Args:
        directory: the run directory.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE

    def append(self, record: dict[str, Any]) -> None:
        """Adds a step and flushes it to the disk, so that no checkpoint is ever ahead of its metrics.

        Raises:
            UserError: the disk is full.
        """
        line = json.dumps({key: _finite(value) for key, value in record.items()}, allow_nan=False)
        with (
            storage_errors(FILE, self.path.parent, "free some space, then go on with --resume"),
            self.path.open("a", encoding="utf-8") as file,
        ):
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All steps, in order. A last line that a kill cut short is left out.

        Raises:
            UserError: another line isn't a step.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        # A whole file ends with a newline; what follows the last one was cut short.
        lines.pop()
        return [self._parse(line, number) for number, line in enumerate(lines, start=1)]

    def truncate(self, step: int) -> None:
        """Keeps steps 1 to `step`, which must all be there.

        Raises:
            UserError: they aren't.
        """
        kept = [record for record in self.read() if record["step"] <= step]
        if [record["step"] for record in kept] != list(range(1, step + 1)):
            raise UserError(
                f"{self.path}: doesn't hold each of the steps 1 to {step} once, which the checkpoint needs; "
                "put the file back, or start anew with another --output"
            )
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    def _parse(self, line: str, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
            if isinstance(record["step"], int):
                return record
        except (ValueError, KeyError, TypeError):
            pass
        raise UserError(
            f"{self.path}:{number}: not a step of a run; put the file back, or start anew with another --output"
        )


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity; null says that there is no number."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
