"""What a run costs in memory."""

from lemo.memory.tracker import PeakMemory, PeakTracker

__all__ = ["PeakMemory", "PeakTracker"]
