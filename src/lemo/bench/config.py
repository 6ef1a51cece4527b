"""What `lemo bench quality` runs: one task, and the methods that are trained on it with the same batches.

Imports no torch, so that mistakes are found at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lemo.config import Frozen, LoraConfig, ModelConfig, Share, SparsityConfig, TrainingConfig
from lemo.config_io import flags, load

BASELINE: Literal["lora+ckpt"] = "lora+ckpt"
Tokens = Annotated[int, Field(ge=2)]


class TaskConfig(Frozen):
    """Which real data the methods are trained and judged on. Training and held-out parts share no document.

    Args:
        kind: `sft`: long prompts of code, completions of random length, labels on the completion.
            `lm`: continued pre-training, every token labelled; related files are joined to full length.
            `retrieval`: facts planted at random depths of real text, questions about them at the end.
            `extension`: `lm` at lengths over the model's own (give `model.rope_scaling`).
        sources: `stdlib`, `package:NAME` (an installed package's sources), folders, files or globs.
        heldout_share: share of the documents that a hash of their names holds out.
        train_sequences: most training sequences; fewer where the text ends.
        heldout_sequences: held-out sequences judged; for `retrieval`, of each length.
        max_tokens: longest sequence (tokens).
        min_tokens: `sft`: shortest prompt.
        completion_tokens: `sft`: shortest and longest completion; lengths are log-uniform.
        lengths: `retrieval`: sequence lengths, drawn uniformly in training, judged one by one.
        keys: `retrieval`: facts planted in each sequence.
        questions: `retrieval`: questions at the end of each sequence, about different facts.
        depths: `retrieval`: equal bins of depth (place of the fact / length of the text) of the heat map.
        buckets: position buckets of the held-out loss.
    """

    kind: Literal["sft", "lm", "retrieval", "extension"]
    sources: tuple[str, ...] = Field(default=("stdlib",), min_length=1)
    heldout_share: float = Field(default=0.2, gt=0.0, lt=1.0)
    train_sequences: int = Field(default=400, ge=1)
    heldout_sequences: int = Field(default=32, ge=1)
    max_tokens: Tokens = 8192
    min_tokens: int = Field(default=2048, ge=1)
    completion_tokens: tuple[Tokens, Tokens] = (128, 1024)
    lengths: tuple[Tokens, ...] = Field(default=(1024, 2048, 4096, 8192), min_length=1)
    keys: int = Field(default=24, ge=1)
    questions: int = Field(default=8, ge=1)
    depths: int = Field(default=6, ge=1)
    buckets: int = Field(default=8, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> TaskConfig:
        shortest, longest = self.completion_tokens
        if shortest > longest:
            raise ValueError("completion_tokens must be [shortest, longest]")
        if self.kind == "sft" and self.min_tokens + longest > self.max_tokens:
            raise ValueError("min_tokens (the shortest prompt) and the longest completion must fit in max_tokens")
        if self.questions > self.keys:
            raise ValueError(f"questions ({self.questions}) can't exceed keys ({self.keys})")
        if self.kind == "retrieval" and max(self.lengths) != self.max_tokens:
            raise ValueError(f"max_tokens must be the largest of lengths ({max(self.lengths)})")
        return self


# LongLoRA's.
GROUPS = 4
Groups = Annotated[int, Field(ge=1)]


class MethodConfig(Frozen):
    """One row of the comparison, trained once for each of its seeds.

    Args:
        method: `lora+ckpt`: ordinary LoRA with gradient checkpointing; always run, all else is measured against it.
            `longlora`: LongLoRA's shifted attention while training, in `groups`.
            `truncated`: ordinary LoRA on sequences cut to the share `keep` of their tokens (the last ones; a random
            stretch where every token is labelled).
            `stopped`: ordinary LoRA that ends after the share `keep` of its steps, in the middle of its schedule: what
            the passes so far came to, for methods whose first passes run dense.
            `labels-only`: no gradient through the prompt: only blocks with labels, no gradients into other keys.
            `random-blocks`: as lemo-backward with the share `keep`, blocks drawn at random in each layer.
            `lemo-backward`, `lemo-segments`, `lemo-forward`: as `sparsity` says; `lemo-attend` and those with
            `+attend`: with `sparsity.attend`.
        setting: names the row's knobs; unique among the rows of one method. `default` is the product's default.
        keep: `truncated` and `random-blocks`: share of tokens; `stopped`: of steps.
        groups: `longlora`: how many a sequence is cut into; None for the paper's four.
        sparsity: the lemo methods' settings.
        learning_rate: in place of `training.learning_rate`.
        seeds: the first so many of the study's seeds; None takes all.
        equal_time: also train with as many steps as fit in the baseline's time.
        timed: time its steps (`timed_steps`); rows with `equal_time`, and the baseline, always are.
    """

    method: Literal[
        "lora+ckpt",
        "longlora",
        "truncated",
        "stopped",
        "labels-only",
        "random-blocks",
        "lemo-backward",
        "lemo-segments",
        "lemo-forward",
        "lemo-attend",
        "lemo-backward+attend",
        "lemo-segments+attend",
    ]
    setting: str = "default"
    keep: Share | None = None
    groups: Groups | None = None
    sparsity: SparsityConfig | None = None
    learning_rate: float | None = Field(default=None, gt=0)
    seeds: int | None = Field(default=None, ge=1)
    equal_time: bool = False
    timed: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> MethodConfig:
        takes_keep = self.method in ("truncated", "stopped", "random-blocks")
        if takes_keep != (self.keep is not None):
            raise ValueError(f"{self.method} {'needs a' if takes_keep else 'takes no'} keep of its own")
        refuse_other_groups(self.method, self.groups)
        if self.method == "stopped" and (self.timed or self.equal_time):
            raise ValueError("a step of stopped takes the baseline's time; leave timed and equal_time out")
        if self.method.startswith("lemo-") != (self.sparsity is not None):
            raise ValueError(f"sparsity belongs to the lemo methods, and each needs it (here: {self.method})")
        if self.sparsity is not None:
            mode, policy = {
                "lemo-backward": ("backward", "energy"),
                "lemo-segments": ("backward", "segments"),
                "lemo-forward": ("forward", "energy"),
                "lemo-attend": ("dense", "energy"),
            }[self.method.removesuffix("+attend")]
            if (self.sparsity.mode, self.sparsity.policy) != (mode, policy):
                raise ValueError(f"{self.method} needs sparsity.mode {mode} and policy {policy}")
            refuse_other_attend(self.method, self.sparsity)
        return self


class QualityConfig(Frozen):
    """A quality study: a YAML file plus `--set key=value`.

    Args:
        task: the data.
        methods: rows beside the baseline, which needs no mention.
        seeds: of LoRA's initial weights, the order of the data, dropout and draws; the same for every method.
        training: as for `lemo finetune`; its seed is not used.
        timed_steps: steps of the methods to be timed (`MethodConfig.timed`), alone on the device, after three warm-up
            steps; 0 skips the timing, and with it what depends on it (`step_ms`, equal time).
        workers: training runs at a time, each in a process of its own; they share the device.
        commit: recorded in every row; None asks git.
        output: directory of `records.jsonl`, `report.html` and the resolved `config.yaml`.
    """

    task: TaskConfig
    methods: tuple[MethodConfig, ...] = ()
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    training: TrainingConfig = TrainingConfig(learning_rate=5e-4, save_every=0)
    timed_steps: int = Field(default=10, ge=0)
    workers: int = Field(default=1, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    commit: str | None = None
    output: str = "runs/quality"

    @model_validator(mode="after")
    def _consistent(self) -> QualityConfig:
        refuse_same_names([(row.method, row.setting) for row in self.methods])
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds must differ")
        if self.task.kind in ("lm", "extension") and any(row.method == "labels-only" for row in self.methods):
            raise ValueError(f"labels-only leaves nothing out in task {self.task.kind}, where every token is labelled")
        if any(row.equal_time or row.timed for row in self.methods) and self.timed_steps == 0:
            raise ValueError("equal_time and timed need timed_steps over 0")
        return self


def refuse_other_attend(method: str, sparsity: SparsityConfig) -> None:
    """Raises ValueError where a method's name and `sparsity.attend` don't agree."""
    if method.endswith("attend") != (sparsity.attend is not None):
        raise ValueError(f"sparsity.attend belongs to lemo-attend and methods with +attend (here: {method})")


def refuse_other_groups(method: str, groups: int | None) -> None:
    """Raises ValueError where a method that isn't LongLoRA is given groups."""
    if groups is not None and not method.startswith("longlora"):
        raise ValueError(f"groups belong to longlora (here: {method})")


def refuse_same_names(names: Sequence[tuple[str, str]]) -> None:
    """Raises ValueError where two rows have the same (method, setting)."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two rows are {name[0]} with setting {name[1]!r}; name the settings apart")


def load_quality(
    path: Path,
    *,
    model: str | None = None,
    output: str | None = None,
    device: str | None = None,
    overrides: Sequence[str] = (),
) -> QualityConfig:
    """The resolved configuration of a study: the flags of those names and `--set key=value` win over the file.

    Raises:
        UserError: unreadable file, bad YAML, unknown key, or a value that isn't allowed.
    """
    return load(QualityConfig, path, flags(model=model, output=output, device=device), overrides)
