"""`finetune`: from a configuration to an adapter and its records. What can be refused is refused before any work.

Order: output directory, checkpoint (when resuming), model, data and its table, checks; then LoRA, sparsity, evaluation
before, training, evaluation after. The run directory is created only when everything has been checked.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase, set_seed

import lemo
from lemo.config import LoraConfig, RunConfig
from lemo.data import Collator, Loaded, load
from lemo.errors import UserError
from lemo.evaluation import EvaluationResult, Sample, compare_positions, evaluate, gradient_agreement, sample_completion
from lemo.models.attention_plans import attention_for
from lemo.models.device import choose_device
from lemo.models.loading import load_model
from lemo.training import checkpoints
from lemo.training.auto import choose_sparsity
from lemo.training.checks import check_labels_fit, check_length, fingerprint_data, fingerprint_model
from lemo.training.directory import close_run, is_main_process, open_run, refuse_used
from lemo.training.metrics import MetricsLog
from lemo.training.progress import StepDisplay
from lemo.training.summary import Summary, totals, versions
from lemo.training.trainer import LemoTrainer, training_arguments


def finetune(config: RunConfig, *, resume: bool = False) -> Summary:
    """Fine-tunes a model with LoRA while blocks of tokens are left out, and writes a run directory.

    Under torchrun each process trains on its share of every batch; only the first writes.

    Args:
        config: the run's. `config.output` must be absent or empty, unless `resume`.
        resume: go on from the newest checkpoint in `config.output`; every setting that decides the result must be as
            when it was written.

    Returns:
        What `summary.json` holds.

    Raises:
        UserError: anything the user can fix; the message says how. Existing files are never overwritten.
    """
    started = time.perf_counter()
    run = Path(config.output)
    checkpoint = checkpoints.newest(run) if resume else None
    if checkpoint is None and is_main_process():
        refuse_used(run)
    console = Console(stderr=True, quiet=not is_main_process())

    device = choose_device(config.device)
    model, tokenizer = load_model(config.model, device)
    check_length(model, config)
    data = load(config.data, tokenizer, config.training.seed)
    console.print(data.report.render())
    if config.sparsity.mode == "auto":
        train = data.report.train
        choice = choose_sparsity(config.sparsity, train.sequence_lengths, train.labelled_tokens)
        config = config.model_copy(update={"sparsity": choice.sparsity})
        console.print(choice.reason, highlight=False, soft_wrap=True)
    check_labels_fit(data.train, config)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    identity = checkpoints.identity(config, fingerprint_model(model), fingerprint_data(data.train), processes)
    if checkpoint is not None:
        checkpoints.check_identity(checkpoint, identity)
    job = _Job(config, device, data, tokenizer, console, identity, checkpoint)
    model = prepare_model(model, config)
    if is_main_process():
        open_run(run, config, model, checkpoint)
    try:
        before = job.judge(model, "before")
        with attention_for(model.config, config.data.max_tokens):
            job.train(model)
        after = job.judge(model, "after")
        agreement = job.compare_gradients(model)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the device is out of memory; lower data.max_tokens, training.batch_size, sparsity.keep or "
            "sparsity.fidelity, then start anew with another --output"
        ) from error
    records = MetricsLog(run).read()
    result = Summary(
        mode=config.sparsity.mode,
        model=config.model.name,
        loss_before=before.result.loss if before.result else None,
        loss_after=after.result.loss if after.result else None,
        seed=config.training.seed,
        versions=versions(),
        device=torch.cuda.get_device_name(device) if device != "cpu" else "cpu",
        processes=processes,
        data=data.report.as_dict(),
        heldout_documents=len(before.result.documents) if before.result else 0,
        by_position=_by_position(before.result, after.result),
        sample=_sample(before.sample, after.sample),
        gradient_agreement=agreement,
        wall_s=time.perf_counter() - started,
        **totals(records),
    )
    if is_main_process():
        close_run(run, model, result)
    return result


def prepare_model(model: Any, config: RunConfig) -> Any:
    """The model with a fresh LoRA adapter, sparsified, checkpointed if the configuration says so.

    Raises:
        UserError: LoRA's targets don't exist, or the sparsity doesn't fit the model.
    """
    # LoRA's initial weights come from torch's generator.
    set_seed(config.training.seed)
    try:
        model = peft.get_peft_model(model, adapter_config(config.lora))
    except ValueError as error:
        names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        raise UserError(
            f"lora.targets {config.lora.targets}: {' '.join(str(error).split())[:200]}; this model's linears are "
            f"{', '.join(names)}"
        ) from error
    try:
        lemo.sparsify(model, config.sparsity)
    except ValueError as error:
        raise UserError(f"sparsity: {error}") from error
    # `backward` mode stores one tensor a layer by itself.
    if config.training.gradient_checkpointing and config.sparsity.mode != "backward":
        _checkpoint_activations(model)
    return model


def adapter_config(lora: LoraConfig) -> peft.LoraConfig:
    """PEFT's configuration of the adapter."""
    return peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT divides it by r: any number does
        lora_dropout=lora.dropout,
        target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        task_type="CAUSAL_LM",
    )


def _checkpoint_activations(model: Any) -> None:
    # Renamed in transformers 5.2x; the old name warns there.
    base = model.get_base_model()
    options = {"use_reentrant": False}
    if hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


# Each costs a dense and a sparse gradient.
_AGREEMENT_SEQUENCES = 4


@dataclass(frozen=True)
class _Judgement:
    """The dense model at one moment; None where the configuration asks for none."""

    result: EvaluationResult | None
    sample: Sample | None


@dataclass(frozen=True)
class _Job:
    """What judging and training share."""

    config: RunConfig
    device: str
    data: Loaded
    tokenizer: PreTrainedTokenizerBase
    console: Console
    identity: dict[str, Any]
    checkpoint: Path | None

    def judge(self, model: Any, moment: str) -> _Judgement:
        """Held-out loss and a completion, by the dense model."""
        settings, data = self.config.evaluation, self.data
        if settings.documents == 0:
            return _Judgement(None, None)
        result = evaluate(
            model,
            data.heldout,
            Collator.for_tokenizer(self.tokenizer),
            documents=settings.documents,
            buckets=settings.buckets,
            device=self.device,
            max_tokens=self.config.data.max_tokens,
        )
        self.console.print(
            f"held-out loss {moment}: {result.loss:.4f} (perplexity {result.perplexity:.2f}; {len(result.documents)} "
            f"documents, {result.tokens:,} labelled tokens)",
            highlight=False,
            soft_wrap=True,
        )
        sample = None
        if settings.sample_tokens:
            sample = sample_completion(model, self.tokenizer, data.heldout[0], settings.sample_tokens)
        return _Judgement(result, sample)

    def compare_gradients(self, model: Any) -> dict[str, float] | None:
        """The `segments` policy's gradient against the dense one, a mean over training sequences; else None.

        Its loss is unbiased, its gradient isn't: that is worth a number in the record of every run.
        """
        if self.config.sparsity.policy != "segments":
            return None
        collate = Collator.for_tokenizer(self.tokenizer)
        batches = [collate([self.data.train[i]]) for i in range(min(_AGREEMENT_SEQUENCES, len(self.data.train)))]
        found = [gradient_agreement(model, batch) for batch in batches]
        mean = {
            "cosine": sum(f["cosine"] for f in found) / len(found),
            "norm_ratio": sum(f["norm_ratio"] for f in found) / len(found),
            "sequences": len(found),
        }
        self.console.print(
            f"gradient of the drawn spans against the dense one: cosine {mean['cosine']:.3f}, norm ratio "
            f"{mean['norm_ratio']:.2f} (mean of {len(found)} training sequences)",
            highlight=False,
            soft_wrap=True,
        )
        return mean

    def train(self, model: Any) -> None:
        """All steps that aren't made yet; leaves the trained adapter in the model."""
        config, done = self.config, checkpoints.step_of(self.checkpoint) if self.checkpoint else 0
        try:
            args = training_arguments(config, model.get_base_model().dtype, self.device)
        except ValueError as error:
            raise UserError(f"{' '.join(str(error).split())}; set model.dtype=float32") from error
        display = StepDisplay(config.training.steps, done, self.console)
        trainer = LemoTrainer(
            model,
            args,
            config=config,
            identity=self.identity,
            display=display,
            train_dataset=self.data.train,
            data_collator=Collator.for_tokenizer(self.tokenizer),
        )
        try:
            if self.checkpoint is not None and done == config.training.steps:
                trainer.load_weights(self.checkpoint)
            else:
                trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
        finally:
            display.close()
        # Takes off what accelerate put around the forward pass (DDP, autocast).
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)


def _by_position(before: EvaluationResult | None, after: EvaluationResult | None) -> list[dict[str, Any]]:
    if before is None or after is None:
        return []
    return compare_positions(before.by_position, after.by_position)


def _sample(before: Sample | None, after: Sample | None) -> dict[str, str] | None:
    if before is None or after is None:
        return None
    return {
        "prompt_tail": before["prompt_tail"],
        "reference": before["reference"],
        "before": before["completion"],
        "after": after["completion"],
    }
