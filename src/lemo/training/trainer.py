"""transformers.Trainer, changed where a long run needs it: whole checkpoints, one metrics line a step, exact counts.

Four things differ from the Trainer; all else is its own.
1. A checkpoint is written aside and renamed (`lemo.training.checkpoints`), and holds what mode `forward`
   trains beside the adapter. `training_args.bin`, a pickle, is never written.
2. The loss is divided by the labels that enter it. Up to transformers 5.1x the Trainer counts a sequence's first label
   too, which nothing predicts; later versions decide by the model's `loss_type`. Here it is counted directly.
3. Each optimizer step leaves one line in `metrics.jsonl`, before its checkpoint.
4. A loss that isn't finite ends the run instead of being averaged away.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments

from lemo.config import RunConfig
from lemo.errors import UserError
from lemo.memory import PeakTracker
from lemo.models import get_runtime
from lemo.training import checkpoints
from lemo.training.callback import StepCallback
from lemo.training.forward_state import keep_state, load_state, save_state
from lemo.training.metrics import MetricsLog
from lemo.training.progress import StepDisplay
from lemo.training.storage import require_space, storage_errors
from lemo.types import StepStats

IGNORED = -100
# Trainer state, scheduler, random states and manifest together.
_CHECKPOINT_EXTRA = 2 * 2**20


class LemoTrainer(Trainer):
    """See the module.

    Args:
        model: sparsified PEFT model.
        args: from `training_arguments`.
        config: the run's.
        identity: from `checkpoints.identity`, stored in every checkpoint.
        display: told of every step; None shows nothing.
        kwargs: `train_dataset`, `data_collator` and others of transformers.Trainer.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        config: RunConfig,
        identity: dict[str, Any],
        display: StepDisplay | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, **kwargs)
        self.adapted: Any = model
        keep_state(model)
        self.add_callback(StepCallback())
        self.remove_callback(PrinterCallback)
        # The sparsified model divides by num_items_in_batch itself.
        self.model_accepts_loss_kwargs = True
        self.run_directory = Path(config.output)
        self.run_config = config
        self.identity = identity
        self.display = display
        self.metrics_log = MetricsLog(self.run_directory)
        self.tracker = PeakTracker(args.device)
        self._aside: Path | None = None
        self._tokens = self._labels = 0
        self._started = time.perf_counter()

    # ---- What enters the loss ----

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro-batches of one optimizer step; here the step's clock and its memory peak start."""
        self._started = time.perf_counter()
        self.tracker.reset()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.tensor([sum(map(count_tokens, batches)), sum(map(count_labels, batches))], device=device)
        self._tokens, self._labels = self.accelerator.reduce(counts, "sum").tolist()
        return batches, num_items

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Labels that enter the loss of this optimizer step, over all micro-batches and ranks."""
        count = torch.tensor(sum(map(count_labels, batch_samples)), device=device)
        return self.accelerator.reduce(count, "sum")

    # ---- Metrics ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Called once an optimizer step, with the loss averaged over ranks, and at the end, which is ignored."""
        if "loss" not in logs:
            return
        seconds = time.perf_counter() - self._started
        stats = self._collect()
        if not math.isfinite(logs["loss"]):
            raise UserError(
                f"the loss became {logs['loss']} at step {self.state.global_step}; lower training.learning_rate or "
                "training.max_grad_norm, or set model.dtype to float32 or bfloat16, and choose another --output"
            )
        peak = self.tracker.read()
        record = {
            "step": self.state.global_step,
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            "tokens": self._tokens,
            "labelled_tokens": self._labels,
            "tokens_per_s": self._tokens / seconds,
            "step_s": seconds,
            "peak_gib": peak.peak_gib,
            "peak_reserved_gib": peak.peak_reserved_gib,
            "keep": [list(pair) for pair in stats.keep],
            "keep_mean": stats.keep_mean,
            "fidelity": list(stats.fidelity),
            "fidelity_mean": stats.fidelity_mean,
            "density": stats.density,
        }
        if self.is_world_process_zero():
            self.metrics_log.append(record)
            if self.display is not None:
                self.display.show(record)

    def _collect(self) -> StepStats:
        """What the layers left out in this step, averaged over ranks."""
        runtime = get_runtime(self.adapted)
        assert runtime is not None, "LemoTrainer is given sparsified models"
        stats = runtime.collect()
        if self.args.world_size == 1:
            return stats
        flat = [value for pair in stats.keep for value in pair]
        flat += [-1.0 if f is None else f for f in (*stats.fidelity, stats.density)]
        mean = self.accelerator.reduce(torch.tensor(flat, device=self.args.device), "mean").tolist()
        layers = len(stats.keep)
        return StepStats(
            keep=tuple((mean[2 * i], mean[2 * i + 1]) for i in range(layers)),
            fidelity=tuple(
                None if own is None else value for own, value in zip(stats.fidelity, mean[2 * layers : -1], strict=True)
            ),
            density=None if stats.density is None else mean[-1],
        )

    # ---- Checkpoints ----

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.run_directory if self._aside is None else self._aside)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        aside = checkpoints.aside_directory(self.run_directory, step)
        what, remedy = f"checkpoint-{step}", "earlier checkpoints are intact: free some space, then go on with --resume"
        try:
            with storage_errors(what, self.run_directory, remedy):
                if self.args.should_save:
                    require_space(self.run_directory, self._checkpoint_bytes(), what)
                    aside.mkdir()
                self._barrier()
                self._aside = aside
                super()._save_checkpoint(model, trial)
                self._barrier()
                if self.args.should_save:
                    save_state(self.adapted, aside / what)
                    checkpoints.seal(aside / what, step, self.identity)
                    checkpoints.publish(aside, self.run_directory, step)
                    checkpoints.rotate(self.run_directory, self.run_config.training.keep_checkpoints)
                self._barrier()
        except UserError:
            if self.args.should_save:
                checkpoints.remove_leftovers(self.run_directory)
            raise
        finally:
            self._aside = None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The adapter alone: neither `training_args.bin` nor the tokenizer."""
        if self.args.should_save:
            assert output_dir is not None
            # lemo trains no embeddings; PEFT's `auto` would ask the hub about the base model.
            self.adapted.save_pretrained(output_dir, state_dict=state_dict, save_embedding_layers=False)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_state(self.adapted, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """By way of the CPU: on several CPU ranks, Trainers before 5.2x ask torch for `cpu:0`, which it refuses."""
        if checkpoint is not None:
            targets: tuple[tuple[Any, str], ...] = (
                (self.optimizer, "optimizer.pt"),
                (self.lr_scheduler, "scheduler.pt"),
            )
            for target, name in targets:
                target.load_state_dict(torch.load(Path(checkpoint, name), map_location="cpu", weights_only=True))

    def _checkpoint_bytes(self) -> int:
        """Adapter, and two fp32 moments for each of its numbers."""
        trained = [p for p in self.adapted.parameters() if p.requires_grad]
        return sum(p.numel() * (p.element_size() + 8) for p in trained) + _CHECKPOINT_EXTRA

    def _barrier(self) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.barrier()

    def load_weights(self, checkpoint: Path) -> None:
        """The adapter of a checkpoint with bypasses and thresholds, and nothing else of it."""
        self._load_from_checkpoint(str(checkpoint))


def count_labels(batch: dict[str, Any]) -> int:
    """Labels that a causal model's loss uses: all but each sequence's first token's, which nothing predicts."""
    return int((batch["labels"][..., 1:] != IGNORED).sum())


def count_tokens(batch: dict[str, Any]) -> int:
    """Tokens that aren't padding."""
    mask = batch.get("attention_mask")
    return int(batch["input_ids"].numel() if mask is None else (mask != 0).sum())


def training_arguments(config: RunConfig, dtype: torch.dtype, device: str) -> TrainingArguments:
    """The Trainer's arguments for a run.

    Args:
        config: the run's.
        dtype: of the base model's weights; bfloat16 and float16 train under autocast (LoRA's own weights are fp32).
        device: `cpu`, or a CUDA device.
    """
    training = config.training
    args = TrainingArguments(
        output_dir=config.output,
        max_steps=training.steps,
        learning_rate=training.learning_rate,
        warmup_steps=training.warmup_steps,
        lr_scheduler_type=training.scheduler,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.accumulation,
        save_strategy="steps" if training.save_every else "no",
        save_steps=training.save_every or 1,
        seed=training.seed,
        data_seed=training.seed,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=device == "cpu",
        logging_steps=1,
        logging_nan_inf_filter=False,
        # The Trainer would drop columns by the forward's signature; the collator takes what it needs.
        remove_unused_columns=False,
        average_tokens_across_devices=True,
        # A bypass has no part in a pass that leaves nothing out of its branch.
        ddp_find_unused_parameters=config.sparsity.may_train_bypass,
        ddp_broadcast_buffers=False,
        dataloader_pin_memory=device != "cpu",
        disable_tqdm=True,
        report_to="none",
    )
    # One process drives one device: DataParallel would copy the model's runtime.
    assert args.device is not None
    args._n_gpu = min(args.n_gpu, 1)
    return args
