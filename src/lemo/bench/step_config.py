"""What `lemo bench step` measures: training steps by method, model shape and length.

Imports no torch, so that mistakes are found at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lemo.bench.config import Groups, Tokens, refuse_other_attend, refuse_other_groups, refuse_same_names
from lemo.config import Frozen, LoraConfig, Share, SparsityConfig
from lemo.config_io import flags, load

STRONG_BASELINE: Literal["lora+ckpt"] = "lora+ckpt"
LIGER: Literal["lora+ckpt+liger"] = "lora+ckpt+liger"
TRL = ("trl", "trl+liger")


class StepShape(Frozen):
    """A model's shape, with random weights.

    Args:
        name: `llama-3-8b`, `qwen3-8b`, `llama-2-7b`, `smollm2-135m`, `opt-1.3b` or `opt-350m`.
        layers: how many layers; None gives the model's own depth. Two rows of one shape with fewer layers give an
            extrapolation to full depth, which the report marks as such.
        lengths: sequence lengths in place of the benchmark's.
    """

    name: Literal["llama-3-8b", "qwen3-8b", "llama-2-7b", "smollm2-135m", "opt-1.3b", "opt-350m"]
    layers: int | None = Field(default=None, ge=1)
    lengths: tuple[Tokens, ...] | None = None


def checkpointed(method: str) -> bool:
    """Whether a method recomputes whole layers by gradient checkpointing."""
    return "+ckpt" in method or method == "lemo-attend" or method in TRL


class StepMethod(Frozen):
    """One row for each shape and length.

    Args:
        method: `lora`: PEFT LoRA and the segmented loss. `lora+logits`: the same with transformers' own loss, of all
            logits. `lora+ckpt`: `lora` with gradient checkpointing, the strong baseline. `lora+ckpt+liger`: the same
            with Liger's kernels and its loss. `trl`: the same adapter trained by TRL's SFTTrainer, with gradient
            checkpointing and its own loss; `trl+liger`: with `use_liger_kernel` too; no `parts` of either. `longlora`:
            `lora` with LongLoRA's shifted attention in `groups`. `lemo-backward`, `lemo-attend`,
            `lemo-backward+attend`, `lemo-forward`: as `sparsity` says; `lemo-forward` chooses by predictors with random
            weights, of the size they have before they shrink: which blocks that gives says nothing about a real model,
            what it costs does. With `+ckpt` it and LongLoRA are checkpointed.
        setting: names the row's knobs; unique among the rows of one method.
        groups: `longlora`: how many a sequence is cut into; None for the paper's four.
        sparsity: the lemo methods' settings.
        placement: which blocks `lemo-backward` keeps. `energy`: those it chooses, which with random weights says little
            about a real model. `spread`: the labelled ones and as many others, evenly spread, as `keep` asks for;
            choosing is done and paid for all the same. `recorded`: as `spread`, but spread over the sequence as in a
            real model's layer at the same relative depth (`StepConfig.placements`).
        keep: `spread`, `recorded`: share of the blocks kept in every layer.
    """

    method: Literal[
        "lora",
        "lora+logits",
        "lora+ckpt",
        "lora+ckpt+liger",
        "trl",
        "trl+liger",
        "longlora",
        "longlora+ckpt",
        "lemo-backward",
        "lemo-attend",
        "lemo-backward+attend",
        "lemo-forward",
        "lemo-forward+ckpt",
    ]
    setting: str = "default"
    groups: Groups | None = None
    sparsity: SparsityConfig | None = None
    placement: Literal["energy", "spread", "recorded"] = "energy"
    keep: Share | None = None

    @model_validator(mode="after")
    def _consistent(self) -> StepMethod:
        backward = self.method in ("lemo-backward", "lemo-backward+attend")
        refuse_other_groups(self.method, self.groups)
        if self.method.startswith("lemo-") != (self.sparsity is not None):
            raise ValueError(f"sparsity belongs to the lemo methods, and each needs it (here: {self.method})")
        if self.sparsity is not None:
            if backward and not self.sparsity.by_energy:
                raise ValueError(f"{self.method} needs sparsity.mode backward and policy energy")
            if self.forward and (self.sparsity.mode != "forward" or self.sparsity.calibration is not None):
                raise ValueError("lemo-forward needs sparsity.mode forward and no calibration, for weights are random")
            if self.method == "lemo-attend" and self.sparsity.mode != "dense":
                raise ValueError(f"{self.method} needs sparsity.mode dense")
            refuse_other_attend(self.method, self.sparsity)
        if (self.placement != "energy") != (self.keep is not None):
            raise ValueError("keep goes together with placement spread or recorded")
        if self.placement != "energy" and not backward:
            raise ValueError(f"placement belongs to lemo-backward (here: {self.method})")
        return self

    @property
    def forward(self) -> bool:
        """Whether tokens are left out of the forward pass."""
        return self.method.startswith("lemo-forward")

    @property
    def longlora(self) -> bool:
        """Whether attention is LongLoRA's."""
        return self.method.startswith("longlora")

    @property
    def trl(self) -> bool:
        """Whether TRL's trainer makes the steps."""
        return self.method in TRL

    @property
    def liger(self) -> bool:
        """Whether Liger's kernels run."""
        return self.method.endswith("+liger")

    @property
    def packages(self) -> tuple[str, ...]:
        """What runs beside transformers and PEFT, to be recorded with its version."""
        return (("trl",) if self.trl else ()) + (("liger-kernel",) if self.liger else ())

    @property
    def checkpointed(self) -> bool:
        """See the function."""
        return checkpointed(self.method)


class StepConfig(Frozen):
    """A step benchmark: a YAML file plus `--set key=value`.

    Args:
        shapes: models.
        lengths: tokens of the one sequence of a step.
        methods: rows; all are measured in one process, shape by shape.
        labels: labelled tokens, the sequence's last; `all` labels every token (task `lm` in the records).
        placements: file of `placement: recorded`, as `python -m benchmarks.record_placement` writes it.
        warm_up: steps before the timed ones.
        repeats: timed steps; median and range are recorded.
        parts: one more step of each row under the profiler, whose time is recorded by part.
        dtype: of the frozen weights; LoRA's are fp32 and steps run under autocast, as in `lemo finetune`.
        commit: recorded in every row; None asks git.
        output: directory of `records.jsonl`, `report.html` and the resolved `config.yaml`.
    """

    shapes: tuple[StepShape, ...] = Field(min_length=1)
    lengths: tuple[Tokens, ...] = Field(min_length=1)
    methods: tuple[StepMethod, ...] = Field(min_length=1)
    labels: Annotated[int, Field(ge=1)] | Literal["all"] = 512
    placements: str | None = None
    warm_up: int = Field(default=1, ge=0)
    repeats: int = Field(default=3, ge=1)
    parts: bool = False
    lora: LoraConfig = LoraConfig()
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    commit: str | None = None
    output: str = "runs/step"

    @model_validator(mode="after")
    def _consistent(self) -> StepConfig:
        refuse_same_names([(row.method, row.setting) for row in self.methods])
        places = [(shape.name, shape.layers, T) for shape in self.shapes for T in shape.lengths or self.lengths]
        for place in places:
            if places.count(place) > 1:
                raise ValueError(f"two shapes are {place[0]} with layers {place[1]} at {place[2]:,} tokens")
        if self.placements is None and any(row.placement == "recorded" for row in self.methods):
            raise ValueError("placement recorded needs placements, a file of recorded ones")
        shortest = min(T for _, _, T in places)
        if self.labels != "all" and self.labels >= shortest:
            raise ValueError(f"labels ({self.labels}) must be fewer than the shortest sequence's tokens ({shortest})")
        return self

    def labelled(self, T: int) -> int:
        """Labels of a sequence; nothing predicts its first token."""
        return T - 1 if self.labels == "all" else self.labels


def load_step(
    path: Path, *, output: str | None = None, device: str | None = None, overrides: Sequence[str] = ()
) -> StepConfig:
    """The resolved configuration of a step benchmark: flags and `--set key=value` win over the file.

    Raises:
        UserError: unreadable file, bad YAML, unknown key, or a value that isn't allowed.
    """
    return load(StepConfig, path, flags(output=output, device=device), overrides)
