"""Bypasses that train, in a checkpoint: the dense model has no use for them, a resumed run has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lemo.errors import UserError
from lemo.models import get_runtime
from lemo.models.calibration import bypasses_of, tensors_of

FILE = "lemo_bypasses.safetensors"


def keep_bypasses(model: Any) -> None:
    """Promises a sparsified model that its checkpoints will hold its bypasses, of which it warns otherwise."""
    runtime = get_runtime(model)
    if runtime is not None:
        runtime.bypasses_kept = True


def save_bypasses(model: Any, checkpoint: Path) -> None:
    """Writes a sparsified model's bypasses into a checkpoint's directory, if they train."""
    runtime = get_runtime(model)
    if runtime is not None and runtime.config.train_bypass:
        save_file(tensors_of({}, runtime.bypasses), checkpoint / FILE)


def load_bypasses(model: Any, checkpoint: Path) -> None:
    """Puts what `save_bypasses` wrote into a model that has the same bypasses, if they train.

    Raises:
        UserError: the checkpoint has none, damaged ones, or those of another model or calibration.
    """
    runtime = get_runtime(model)
    if runtime is None or not runtime.config.train_bypass:
        return
    try:
        stored = bypasses_of(load_file(checkpoint / FILE))
        if stored.keys() != runtime.bypasses.keys():
            raise ValueError("it has others")
        for key, bypass in stored.items():
            runtime.bypasses[key].load_state_dict(bypass.state_dict())
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{checkpoint / FILE} doesn't hold this model's bypasses ({' '.join(str(error).split())}); resume from "
            "a checkpoint with the same calibration, in the run's own output_dir, that was written with "
            "lemo.training.BypassCheckpoints, or train anew"
        ) from error


class BypassCheckpoints(TrainerCallback):
    """For `transformers.Trainer` and TRL's trainers: `callbacks=[BypassCheckpoints()]`.

    Their checkpoints of a PEFT model hold its adapter; with this they hold its bypasses too, and a resumed run goes on
    with them (`SparsityConfig.train_bypass`). The checkpoint must lie in the run's `output_dir`. `lemo finetune` does
    so by itself.
    """

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Adds the bypasses to the checkpoint that has just been written."""
        if args.should_save:
            save_bypasses(model, _checkpoint(args, state))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Takes them from the checkpoint that training goes on from.

        Raises:
            UserError: as `load_bypasses`.
        """
        keep_bypasses(model)
        if state.global_step:
            load_bypasses(model, _checkpoint(args, state))


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
