"""The quality lab's tasks: real text on disk to training and held-out sequences, the same in every run.

task = lemo.bench.tasks.build_task(config, tokenizer)  # .train and .heldout: datasets.Dataset; .facts
"""

from lemo.bench.tasks.build import Task, build_task

__all__ = ["Task", "build_task"]
