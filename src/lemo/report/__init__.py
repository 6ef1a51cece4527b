"""A run directory as one page: `report.html`, with nothing loaded from anywhere else.

path = lemo.report.build(Path("runs/default"))
"""

from __future__ import annotations

from lemo.report.page import build

__all__ = ["build"]
