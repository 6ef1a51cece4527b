"""TRL's SFTTrainer as users run it, for the step benchmark's baselines.

The trainer itself trains, on one sequence again and again: PEFT's adapter, checkpointing, autocast, collator, loss and
metrics are its own. Timed is what lies between its callbacks `on_step_begin` and `on_step_end`: forward, backward and
optimizer step, as in all rows. Loading, logging, saving and clipping of gradients are off or outside.
"""

from __future__ import annotations

import importlib.util
import tempfile
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from lemo.bench.liger import modeling_kept
from lemo.bench.timing import timed
from lemo.config import LoraConfig
from lemo.errors import UserError
from lemo.memory import PeakTracker
from lemo.memory.tracker import GIB, PeakMemory
from lemo.training.job import adapter_config


def check_trl() -> None:
    """Refuses TRL's rows where they can't run.

    Raises:
        UserError: trl isn't installed.
    """
    if importlib.util.find_spec("trl") is None:
        raise UserError("trl needs the package of that name; pip install trl, or leave the method out")


@dataclass(frozen=True)
class TrlSteps:
    """Timed steps of one trainer; GiB.

    Attributes:
        seconds: of each timed step.
        peak: over the timed steps.
        weights_gib: of all parameters, None on a CPU, whose peak is that of the whole process.
    """

    seconds: tuple[float, ...]
    peak: PeakMemory
    weights_gib: float | None


def trl_steps(
    model: Any, batch: dict[str, Tensor], lora: LoraConfig, device: str, *, warm_up: int, repeats: int, liger: bool
) -> TrlSteps:
    """Steps of an SFTTrainer without packing, with gradient checkpointing.

    Args:
        model: transformers CausalLM; bf16 autocast if that is its dtype. It must not be used afterwards.
        batch: one sequence's `input_ids` and `labels`, [1, T].
        lora: the adapter's.
        device: where it trains.
        warm_up, repeats: steps before the timed ones, and these.
        liger: with `use_liger_kernel`; what that replaces in transformers' module is put back.
    """
    from trl import SFTConfig, SFTTrainer

    clock = _Clock(device, warm_up)
    with (
        tempfile.TemporaryDirectory() as directory,
        modeling_kept(model) if liger else nullcontext(),
    ):
        options: dict[str, Any] = {
            "output_dir": directory,
            "max_steps": warm_up + repeats,
            "per_device_train_batch_size": 1,
            "max_length": batch["input_ids"].shape[1],
            "packing": False,
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "gradient_checkpointing": True,
            "bf16": model.dtype == torch.bfloat16,
            "use_liger_kernel": liger,
            "use_cpu": device == "cpu",
            "optim": "adamw_torch",
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.01,
            "max_grad_norm": 0.0,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**options),
            train_dataset=Dataset.from_dict({name: rows.tolist() for name, rows in batch.items()}),
            processing_class=_tokenizer(),
            peft_config=adapter_config(lora),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trained: Any = trainer.model
        weights = sum(p.numel() * p.element_size() for p in trained.parameters())
        trainer.train()
    return TrlSteps(tuple(clock.seconds), clock.tracker.read(), weights / GIB if device != "cpu" else None)


class _Clock(TrainerCallback):
    """Times each step after the warm-up; memory's peak counts from there."""

    def __init__(self, device: str, warm_up: int) -> None:
        self.tracker = PeakTracker(device)
        self.seconds: list[float] = []
        self._device, self._warm_up = device, warm_up
        self._step = ExitStack()
        self._timer: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._warm_up:
            self.tracker.reset()
        self._timer = self._step.enter_context(timed(self._device))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step.close()
        if state.global_step > self._warm_up:
            self.seconds += self._timer


def _tokenizer() -> PreTrainedTokenizerFast:
    """What the trainer asks for a token to pad with; the one sequence needs no padding."""
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>")), pad_token="<pad>"
    )
