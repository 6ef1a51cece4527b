"""One training run of a quality study, from a fresh model to its judgement by the dense model.

Every method goes the way of `lemo finetune`: the same model, LoRA, Trainer and order of the data; what differs is what
a method leaves out. A run starts from freshly loaded weights, so that nothing of an earlier run can be left in them.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from lemo.bench.baselines import StopEarly, shift_attention, truncate_rows
from lemo.bench.config import GROUPS, MethodConfig, QualityConfig
from lemo.bench.cost import grouped_work
from lemo.bench.tasks import Task
from lemo.config import DataConfig, RunConfig, SparsityConfig
from lemo.data import Collator
from lemo.errors import UserError
from lemo.evaluation import Answer, BucketLoss, evaluate, retrieval_answers
from lemo.models import sparse_evaluation
from lemo.models.attention_plans import attention_for
from lemo.models.calibration import fill_in, read_calibration
from lemo.models.device import choose_device
from lemo.models.loading import load_model
from lemo.training.checks import check_labels_fit, check_length
from lemo.training.job import prepare_model
from lemo.training.metrics import MetricsLog
from lemo.training.summary import totals
from lemo.training.trainer import LemoTrainer, training_arguments

WARM_UP = 3


@dataclass(frozen=True)
class Judgement:
    """A model on the held-out part: loss, loss by position, and the answers of a retrieval task."""

    loss: float
    by_position: tuple[BucketLoss, ...]
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Trained:
    """What one run came to.

    Attributes:
        after: the dense model's judgement; `after_sparse`: with blocks left out as in training (`forward` only).
        keep, fidelity: means over steps and layers; of truncated sequences, the share of tokens, and of a run that was
            stopped, of steps.
        density: of causal attention, mean over steps and layers; None where queries see everything.
        step_s: seconds of each step.
    """

    after: Judgement
    after_sparse: Judgement | None
    keep: float
    fidelity: float | None
    density: float | None
    peak_gib: float
    peak_reserved_gib: float | None
    step_s: tuple[float, ...]


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of a step, alone on the device: median and range; real tokens a second."""

    median_ms: float
    min_ms: float
    max_ms: float
    tokens_per_s: float


def sparsity_of(method: MethodConfig, kind: str) -> SparsityConfig:
    """What a method leaves out.

    Args:
        method: a row of the study.
        kind: the task's; where every token is labelled, random blocks compete with labelled ones.
    """
    if method.sparsity is not None:
        return method.sparsity
    if method.method == "labels-only":
        return SparsityConfig(fidelity=0.0, keep_sink=False, compensate=False, kv_grad="kept")
    if method.method == "random-blocks":
        labelled: Any = "ranked" if kind in ("lm", "extension") else "always"
        return SparsityConfig(policy="random", keep=method.keep, labelled=labelled)
    return SparsityConfig(mode="dense")


def run_config(study: QualityConfig, method: MethodConfig, seed: int, steps: int, output: str = "unused") -> RunConfig:
    """The configuration that `lemo finetune` would run."""
    changes: dict[str, Any] = {"seed": seed, "steps": steps, "save_every": 0}
    if method.learning_rate is not None:
        changes["learning_rate"] = method.learning_rate
    return RunConfig(
        model=study.model,
        data=DataConfig(max_tokens=study.task.max_tokens),
        lora=study.lora,
        sparsity=sparsity_of(method, study.task.kind),
        training=study.training.model_copy(update=changes),
        device=study.device,
        output=output,
    )


class Laboratory:
    """A study's data on one device, where its runs are made one after the other.

    Args:
        study: what is compared.
        task: the study's data, built once.
    """

    def __init__(self, study: QualityConfig, task: Task) -> None:
        self.study = study
        self.task = task
        self.device = choose_device(study.device)

    def check(self, methods: tuple[MethodConfig, ...]) -> None:
        """Refuses what can't be trained, before anything is.

        Raises:
            UserError: the model is too short for the task; or a method's labelled blocks exceed its keep, its
                calibration isn't there or is for another score or block size, or it is to be timed with dense passes.
        """
        model, _ = load_model(self.study.model, "cpu")
        for method in methods:
            config = run_config(self.study, method, 0, 1)
            check_length(model, config)
            check_labels_fit(self._rows(method), config)
            sparsity, name = config.sparsity, f"{method.method} ({method.setting})"
            if sparsity.calibration is not None:
                try:
                    sparsity = fill_in(sparsity, read_calibration(Path(sparsity.calibration)))
                except ValueError as error:
                    raise UserError(f"{name}: {error}") from error
            if sparsity.dense_share and (method.timed or method.equal_time):
                raise UserError(
                    f"{name}: some of its passes run dense, so a step has no one time; leave timed and equal_time "
                    "out, or set dense_share to 0"
                )

    def judge_untrained(self) -> Judgement:
        """The base model as it comes."""
        model, tokenizer = load_model(self.study.model, self.device)
        return self._judge(model, Collator.for_tokenizer(tokenizer))

    def train(self, method: MethodConfig, seed: int, steps: int) -> Trained:
        """Trains one method with one seed and judges it."""
        with self._trained(method, seed, steps) as (model, collate, metrics):
            after_sparse = None
            if sparsity_of(method, self.task.config.kind).mode == "forward":
                with sparse_evaluation(model):
                    after_sparse = self._judge(model, collate)
            sums = totals(metrics)
            done = len(metrics) / steps
            return Trained(
                after=self._judge(model, collate),
                after_sparse=after_sparse,
                keep=sums["keep_mean"] * self._share(method) * done,
                fidelity=sums["fidelity_mean"],
                density=grouped_work(method.groups or GROUPS) if method.method == "longlora" else sums["density_mean"],
                peak_gib=sums["peak_gib"],
                peak_reserved_gib=sums["peak_reserved_gib"],
                step_s=tuple(line["step_s"] for line in metrics),
            )

    def time(self, method: MethodConfig, steps: int) -> StepTime:
        """Times `steps` training steps after the warm-up. Nothing else may run on the device meanwhile."""
        with self._trained(method, 0, WARM_UP + steps) as (_, _, metrics):
            timed = metrics[WARM_UP:]
            milliseconds = [1000 * line["step_s"] for line in timed]
            return StepTime(
                median_ms=statistics.median(milliseconds),
                min_ms=min(milliseconds),
                max_ms=max(milliseconds),
                tokens_per_s=1000 * sum(line["tokens"] for line in timed) / sum(milliseconds),
            )

    def _share(self, method: MethodConfig) -> float:
        """Tokens a method's sequences have, of the task's."""
        rows = self._rows(method)
        if rows is self.task.train:
            return 1.0
        cut, whole = (sum(map(len, part["input_ids"])) for part in (rows, self.task.train))
        return cut / whole

    def _rows(self, method: MethodConfig) -> Dataset:
        if method.method != "truncated":
            return self.task.train
        assert method.keep is not None, "MethodConfig asks for it"
        return truncate_rows(self.task.train, method.keep, seed=0)

    @contextmanager
    def _trained(self, method: MethodConfig, seed: int, steps: int) -> Iterator[tuple[Any, Collator, list[Any]]]:
        """(model, collator, lines of metrics) after training; the model's memory is free afterwards."""
        if self.device != "cpu":
            torch.cuda.empty_cache()
        with tempfile.TemporaryDirectory() as folder:
            config = run_config(self.study, method, seed, steps, folder)
            base: Any
            base, tokenizer = load_model(self.study.model, self.device)
            model = prepare_model(base, config)
            if method.method == "longlora":
                shift_attention(model, method.groups or GROUPS)
            collate = Collator.for_tokenizer(tokenizer)
            trainer = LemoTrainer(
                model,
                training_arguments(config, base.dtype, self.device),
                config=config,
                identity={},
                train_dataset=self._rows(method),
                data_collator=collate,
            )
            if method.method == "stopped":
                assert method.keep is not None, "MethodConfig asks for it"
                trainer.add_callback(StopEarly(method.keep))
            try:
                with attention_for(base.config, self.study.task.max_tokens):
                    trainer.train()
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"{method.method} ({method.setting}) doesn't fit the device's memory; lower workers, "
                    "task.max_tokens or training.batch_size, or leave the method out"
                ) from error
            trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
            yield model, collate, MetricsLog(Path(folder)).read()

    def _judge(self, model: Any, collate: Collator) -> Judgement:
        task = self.task
        losses = evaluate(
            model,
            task.heldout,
            collate,
            documents=len(task.heldout),
            buckets=task.config.buckets,
            device=self.device,
            max_tokens=task.config.max_tokens,
        )
        answers: tuple[Answer, ...] = ()
        if task.config.kind == "retrieval":
            answers = retrieval_answers(model, task.heldout, self.device)
        return Judgement(losses.loss, losses.by_position, answers)
