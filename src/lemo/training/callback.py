"""What a Trainer tells a sparsified model, and keeps for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lemo.models import get_runtime
from lemo.training.forward_state import keep_state, load_state, save_state


class StepCallback(TrainerCallback):
    """Tells the model how far the run is, so that its first passes run dense (`SparsityConfig.dense_share`), and moves
    a calibration's thresholds (`lemo.selection.following`)."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Before the micro-batches of an optimizer step."""
        _tell(model, state.global_step / state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """After the optimizer step, before its checkpoint."""
        runtime = get_runtime(model)
        if runtime is not None:
            runtime.move_thresholds(args.device)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """The next run may have nobody who tells."""
        _tell(model, None)


class SparsityCallback(StepCallback):
    """For `transformers.Trainer` and TRL's trainers: `callbacks=[SparsityCallback()]`.

    Tells the model how far the run is and moves a calibration's thresholds, which stay as they are without it. And
    their checkpoints of a PEFT model hold its adapter; with this they hold its bypasses that train
    (`SparsityConfig.train_bypass`) and the thresholds too, and a resumed run goes on with them. The checkpoint must lie
    in the run's `output_dir`. `lemo finetune` does all that by itself.
    """

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Adds them to the checkpoint that has just been written."""
        if args.should_save:
            save_state(model, _checkpoint(args, state))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Takes them from the checkpoint that training goes on from.

        Raises:
            UserError: as `load_state`.
        """
        keep_state(model)
        if state.global_step:
            load_state(model, _checkpoint(args, state))


def _tell(model: Any, progress: float | None) -> None:
    runtime = get_runtime(model)
    if runtime is not None:
        runtime.progress = progress


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
