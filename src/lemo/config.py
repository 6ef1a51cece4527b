"""Configuration of what is left out, frozen and validated. Imports no torch, so that mistakes are found at once.

A block is some consecutive tokens of one document, counted from the document's first real token.
Two ways of leaving blocks out (DESIGN section 1): `backward` leaves the forward pass, and so the loss, exact and
back-propagates only the kept blocks; `forward` (the paper's) leaves blocks out of a branch altogether.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(gt=0.0, le=1.0)]
Score = Literal["paper", "mass", "causal"]
PerLayer = float | tuple[float, ...]


class Frozen(BaseModel):
    """Base of every configuration: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class BranchSelection(Frozen):
    """Which blocks take part in one branch (attention or MLP) of each layer, in `forward` mode.

    Give exactly one of:
        keep: share of each document's blocks with the highest score, in (0, 1]; a number, or one number per layer.
        threshold: smallest score that is kept (paper section 4.2); a number, or one number per layer.
    """

    keep: PerLayer | None = None
    threshold: PerLayer | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> BranchSelection:
        if (self.keep is None) == (self.threshold is None):
            raise ValueError("give either keep or threshold, not both and not neither")
        if self.keep is not None:
            values = self.keep if isinstance(self.keep, tuple) else (self.keep,)
            if not values or any(not 0.0 < v <= 1.0 for v in values):
                raise ValueError("keep must lie in (0, 1] (1 keeps every block)")
        return self


class Segments(Frozen):
    """The `segments` policy: each document is cut into `spans` equal spans, `drawn` of them are drawn uniformly."""

    spans: int = Field(default=4, ge=1)
    drawn: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _drawn_at_most_spans(self) -> Segments:
        if self.drawn > self.spans:
            raise ValueError(f"drawn ({self.drawn}) can't exceed spans ({self.spans})")
        return self


# Key blocks in a query block: with a block of 64 keys, the 128 queries that fill a kernel's tile.
QUERY_BLOCKS = 2


class Attend(Frozen):
    """What queries see while the model trains; evaluation is dense. Every query sees all its document's tokens before
    it that lie in its own query block (two blocks), in the document's first block, or in the blocks its query block
    is given, as many for each: the nearest ones, its window, and distant ones chosen for it.

    Args:
        density: share of causal attention that is computed, in each document (a little less, since blocks are whole;
            more where `window`, the first block or `labelled: dense` exceed it), or one per layer. None: the first two.
        window: tokens before its query block that every query sees. Default: half of what `density` allows, or all.
        choice: of distant blocks, in each layer. `none` (default): the nearest, a wider window. `sampled`: drawn by the
            mass that a few queries give them, each with the weight of those it stands for: an estimate of dense
            attention. Which is for which data: docs/quality.md. `pooled`, `random`: without weights (baselines).
        look: `sampled`: share of the queries that are looked at, of each block a power of two, at most 64.
        labelled: `dense`: query blocks with a token that enters the loss see everything, for data with few labels.
        block: tokens per key block; on a GPU 16, 32, 64 or 128.
    """

    density: Share | tuple[Share, ...] | None = 0.25
    window: int | None = Field(default=None, ge=1)
    choice: Literal["none", "pooled", "random", "sampled"] = "none"
    look: Share = 0.0625
    labelled: Literal["dense", "sparse"] = "sparse"
    block: int = Field(default=64, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> Attend:
        if self.density is None and (self.window is None or self.choice != "none"):
            raise ValueError("attend without a density is a window alone: give window, and choice none")
        if self.choice != "sampled" and self.look != Attend.model_fields["look"].default:
            raise ValueError("look is for choice sampled; leave it out")
        return self

    def of_layer(self, layer: int) -> Attend:
        """With that layer's density."""
        if not isinstance(self.density, tuple):
            return self
        return self.model_copy(update={"density": self.density[layer]})


# Which settings a mode or policy reads, of those that not all do; mode dense none of them.
_READS = {
    "mode forward": {"keep", "score"},
    "policy energy": {"compensate", "kv_grad", "fidelity", "keep", "labelled", "keep_sink"},
    "policy random": {"compensate", "kv_grad", "keep", "labelled"},
    "policy segments": {"compensate", "kv_grad", "segments"},
}


class SparsityConfig(Frozen):
    """What `lemo.sparsify` does to a model.

    Args:
        mode: `backward` (default): the loss is exact, only kept blocks are recomputed and back-propagated.
            `forward`: the paper's token elimination; lossy. `dense`: nothing is left out, only the loss is segmented.
            `auto`: `lemo finetune` chooses by the data and says why; what `lemo finetune` does where nothing is said.
        block_size: tokens per block. Default: 1 for `energy`, which then chooses single tokens (the same fidelity with
            fewest of them, docs/decisions/0007), else 64.
        policy: how `backward` chooses: `energy` (by gradient energy, for data with a prompt), `segments` (random
            contiguous spans, for data where every token has a label), or `random` (a baseline of `energy`: as many
            blocks as `keep` allows, drawn anew for each layer and step; `fidelity` isn't used, but measured).
        fidelity: `energy`: share of the squared gradient norm at each layer's output that the kept blocks must hold,
            of what all that compete hold (not the labelled blocks and the sink, which are kept anyway), reached per
            document, in [0, 1]. 1 keeps every block with a nonzero gradient, 0 the labelled ones alone.
        keep: `energy`: cap on the share of each document's blocks that is kept. `random`: that share. `forward`: share
            of blocks kept in both branches (shorthand for `attention` and `mlp`).
        labelled: `energy`, `random`: `always` keeps blocks that hold labels first, `ranked` lets them compete (by
            energy, or in the draw).
        keep_sink: `energy`: keep each document's first block too: the gradient of an attention sink's row is faint at
            a layer's output and large in the weights (docs/decisions/0006).
        compensate: `energy`: estimate from the kept tokens what the branches would have passed back at those left out
            (docs/decisions/0007), instead of nothing.
        kv_grad: gradients through keys and values reach `all` tokens (default), or `kept` ones (that of `segments`).
        segments: the `segments` policy's numbers.
        attention, mlp: `forward`: which blocks take part in that branch; a branch left out stays dense.
        calibration: `forward`: directory that `lemo calibrate` wrote for this model. Its predictors give the scores,
            its bypasses stand in for what is left out, and its thresholds choose, unless keep, attention or mlp do;
            with `lemo finetune`, or `lemo.training.SparsityCallback` in a Trainer of your own, each moves in training,
            so that its branch goes on keeping what it was calibrated to.
        dense_share: `forward`, and wherever `attend` is on: share of the training passes that run dense; they count in
            the average keep and density. They are the run's first (docs/decisions/0010), or drawn at random where
            nothing tells how far the run is: a Trainer of your own needs the callback
            `lemo.training.SparsityCallback`. Default: what the calibration was made for, or 0.
        train_bypass: `forward`: the bypasses train with the adapter, at its learning rate. The dense model has no use
            for them, and they aren't part of the adapter: a Trainer of your own needs the callback to resume. Default:
            where a calibration has some.
        score: `forward`: what attention's blocks are chosen by: `paper` (equations 1-2; sums over later queries, so
            selection looks ahead), `mass` (the softmax mass that later queries give; looks ahead too, and costs twice
            as much to compute) or `causal` (the paper's, but a block's fate is decided by earlier blocks only;
            thresholds only). MLP blocks are chosen by their activity, with `causal` by their predecessor's. Default:
            what the calibration was made for, or `paper`.
        tile_mib: byte budget (MiB) of one row tile of the MLP's forward in `backward` mode; 0 turns tiling off,
            which makes hidden states bitwise those of the unmodified model.
        attend: queries see some blocks of keys only, while training; None: all. In `forward`, kept tokens see some
            blocks of kept tokens, as though a document were what is kept of it.
    """

    mode: Literal["auto", "backward", "forward", "dense"] = "backward"
    block_size: int | None = Field(default=None, ge=1)
    policy: Literal["energy", "segments", "random"] = "energy"
    fidelity: float = Field(default=0.98, ge=0.0, le=1.0)
    keep: Share | None = None
    labelled: Literal["always", "ranked"] = "always"
    keep_sink: bool = True
    compensate: bool = True
    kv_grad: Literal["all", "kept"] | None = None
    segments: Segments = Segments()
    attention: BranchSelection | None = None
    mlp: BranchSelection | None = None
    calibration: str | None = None
    dense_share: float | None = Field(default=None, ge=0.0, lt=1.0)
    train_bypass: bool | None = None
    score: Score | None = None
    tile_mib: float = Field(default=256.0, ge=0.0)
    attend: Attend | None = None

    @model_validator(mode="after")
    def _consistent(self) -> SparsityConfig:
        if self.mode == "auto" and (given := self._changed() - {"mode", "tile_mib"}):
            raise ValueError(f"mode auto chooses by itself; leave {', '.join(sorted(given))} out or name a mode")
        if self.mode == "forward":
            branches = (self.attention, self.mlp)
            if self.keep is None and branches == (None, None) and self.calibration is None:
                raise ValueError(
                    "mode forward needs calibration, keep, or attention and/or mlp with a keep or a threshold"
                )
            if self.keep is not None and branches != (None, None):
                raise ValueError("give keep for both branches, or attention/mlp one by one, not both")
            if self.score == "causal" and (self.keep is not None or any(b and b.keep for b in branches)):
                raise ValueError("score causal needs thresholds: a keep (top-k) looks ahead by itself")
        elif self.attention or self.mlp or self.calibration is not None or self.train_bypass:
            raise ValueError(f"attention, mlp, calibration and train_bypass belong to mode forward, not {self.mode}")
        elif self.dense_share and self.attend is None:
            raise ValueError(f"dense_share belongs to mode forward or to attend; mode {self.mode} has no dense passes")
        if self.mode == "forward" and self.attend is not None and self.tokens_per_block % self.attend.block:
            raise ValueError(
                f"in mode forward attend.block ({self.attend.block}) must divide block_size ({self.tokens_per_block}): "
                "its blocks are kept or left out as a whole"
            )
        if self.fidelity == 0.0 and self.labelled == "ranked":
            raise ValueError("fidelity 0 keeps labelled blocks alone, so labelled can't be ranked")
        if self.policy == "segments" and self.keep is not None:
            raise ValueError("policy segments sets its share by segments.drawn / segments.spans; leave keep out")
        if self.policy == "random" and self.keep is None:
            raise ValueError("policy random needs keep, the share of each document's blocks to draw")
        if self.policy != "energy" and self.mode != "backward":
            raise ValueError(f"policy {self.policy} belongs to mode backward, not {self.mode}")
        what = f"policy {self.policy}" if self.mode == "backward" else f"mode {self.mode}"
        unread = set[str]().union(*_READS.values()) - _READS.get(what, set())
        if self.mode != "auto" and (given := self._changed() & unread):
            raise ValueError(f"{what} doesn't use {', '.join(sorted(given))}; leave it out or choose another mode")
        return self

    def _changed(self) -> set[str]:
        """Names of the settings that aren't the default's."""
        changed = {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}
        # Once the default, which every saved configuration names.
        return changed - ({"score"} if self.score == "paper" else set())

    @property
    def tokens_per_block(self) -> int:
        """`block_size` with its default filled in."""
        return self.block_size or (1 if self.by_energy else 64)

    @property
    def by_energy(self) -> bool:
        """Whether blocks are chosen by gradient energy."""
        return (self.mode, self.policy) == ("backward", "energy")

    @property
    def kv_gradient(self) -> Literal["all", "kept"]:
        """`kv_grad` with its default filled in (DESIGN 4.2)."""
        return self.kv_grad or ("kept" if self.policy == "segments" else "all")

    @property
    def may_train_bypass(self) -> bool:
        """Whether `train_bypass` is on, or may be by default."""
        return self.calibration is not None if self.train_bypass is None else self.train_bypass

    @property
    def attention_selection(self) -> BranchSelection | None:
        """What `forward` mode does in the attention branch; None is dense."""
        return BranchSelection(keep=self.keep) if self.keep is not None else self.attention

    @property
    def mlp_selection(self) -> BranchSelection | None:
        """What `forward` mode does in the MLP branch; None is dense."""
        return BranchSelection(keep=self.keep) if self.keep is not None else self.mlp


class RopeScaling(Frozen):
    """Positions of a model with RoPE stretched to a longer context, before training.

    transformers' `dynamic` isn't offered: its frequencies depend on the lengths a model has seen before, so the same
    text would get another loss after a longer one, and packed documents would stretch each other.

    Args:
        rope_type: `linear` (position interpolation, arXiv 2306.15595) or `yarn` (arXiv 2309.00071).
        factor: longest context / the model's own.
    """

    rope_type: Literal["linear", "yarn"]
    factor: float = Field(gt=1.0, allow_inf_nan=False)


class ModelConfig(Frozen):
    """Which model to fine-tune.

    Args:
        name: `smollm2-135m-instruct` (embedded), a local directory, or a Hugging Face hub name.
        dtype: of the frozen weights; `auto` is bfloat16 on a GPU, float32 on a CPU.
        attention: transformers' attention implementation for the dense forward.
        rope_scaling: extends the model's context; None leaves it as it is. An adapter trained so needs the same
            scaling wherever it is used (`lemo eval`, or transformers' `rope_parameters`): it isn't part of the adapter,
            the run's `config.yaml` holds it.
    """

    name: str = "smollm2-135m-instruct"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    rope_scaling: RopeScaling | None = None


class LoraConfig(Frozen):
    """PEFT's LoRA: rank, scale numerator, dropout, and `all-linear` or names of linears."""

    r: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"


class DataConfig(Frozen):
    """Where documents come from and how they become training sequences.

    Args:
        train: `stdlib` (Python's own library sources), `package:NAME` (an installed package's), a folder, a file,
            or a glob. `.jsonl` files hold one object a line with `text`, `prompt` + `completion`, or `messages`; any
            other file is one document.
        heldout: documents for evaluation, same forms. None splits `train` by a hash of each document's name.
        heldout_share: share of documents the hash sends to held-out, when `heldout` is None.
        max_tokens: longest training sequence (tokens).
        completion_tokens: for plain text and code: the document's last so many tokens are labelled, the rest is
            prompt; 0 labels every token. `prompt`/`completion` and `messages` carry their own labels.
        min_tokens: documents under this are dropped; 0 keeps all.
        overflow: what happens to a document over `max_tokens`: `error`; `truncate` keeps its last `max_tokens`;
            `split` cuts it into consecutive sequences; `drop`.
        packing: several documents in one sequence of at most `max_tokens`, never attending across documents.
        max_documents: take at most so many training documents (in a seeded order); None takes all.
    """

    train: str = "stdlib"
    heldout: str | None = None
    heldout_share: float = Field(default=0.1, gt=0.0, lt=1.0)
    max_tokens: int = Field(default=4096, ge=2)
    completion_tokens: int = Field(default=0, ge=0)
    min_tokens: int = Field(default=0, ge=0)
    overflow: Literal["error", "truncate", "split", "drop"] = "error"
    packing: bool = False
    max_documents: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _lengths_fit(self) -> DataConfig:
        if self.completion_tokens >= self.max_tokens:
            raise ValueError("completion_tokens must be smaller than max_tokens (0 labels every token)")
        if self.min_tokens > self.max_tokens and self.overflow == "drop":
            raise ValueError("min_tokens over max_tokens with overflow drop leaves no document")
        return self


class TrainingConfig(Frozen):
    """The optimisation, handed to transformers.Trainer.

    Args:
        steps: optimizer steps.
        learning_rate, warmup_steps, scheduler, weight_decay, max_grad_norm: as in transformers.TrainingArguments.
        batch_size: sequences per device and forward pass.
        accumulation: forward passes per optimizer step.
        gradient_checkpointing: recompute activations, in `dense` and `forward` mode (`backward` always does).
        save_every: optimizer steps between checkpoints; 0 saves none.
        keep_checkpoints: newest checkpoints kept.
        seed: of LoRA's initial weights, data order, dropout and segment draws.
    """

    steps: int = Field(default=100, ge=1)
    learning_rate: float = Field(default=2e-4, gt=0)
    warmup_steps: int = Field(default=5, ge=0)
    scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "cosine"
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    batch_size: int = Field(default=1, ge=1)
    accumulation: int = Field(default=1, ge=1)
    gradient_checkpointing: bool = True
    save_every: int = Field(default=50, ge=0)
    keep_checkpoints: int = Field(default=2, ge=1)
    seed: int = Field(default=0, ge=0)


class EvaluationConfig(Frozen):
    """Dense evaluation before and after training.

    Args:
        documents: held-out documents evaluated (all, if fewer); 0 skips the evaluation.
        buckets: position buckets for loss by position.
        sample_tokens: tokens of greedy completion shown before and after; 0 shows none.
    """

    documents: int = Field(default=16, ge=0)
    buckets: int = Field(default=8, ge=1)
    sample_tokens: int = Field(default=64, ge=0)


class RunConfig(Frozen):
    """One run of `lemo finetune`: a YAML file plus `--set key=value`."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    lora: LoraConfig = LoraConfig()
    sparsity: SparsityConfig = SparsityConfig(mode="auto")
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    output: str = "runs/default"
