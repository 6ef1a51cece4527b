"""What a sparsified model's instances do differently: a mixin each for CausalLM, decoder, decoder layer and attention.

`lemo.models.surgery` puts a mixin in front of an instance's own class; nothing of transformers is copied or patched.
The decoder notes where documents lie, the layers run sparsely, the CausalLM computes the segmented loss.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from lemo.loss import segmented_cross_entropy
from lemo.models.attend import CALL, AttendCall, attention_by_lists
from lemo.models.documents import BOUNDS, documents_by_bounds, needs_no_mask
from lemo.models.fused import fused, low_copies
from lemo.models.runtime import BatchState, Runtime
from lemo.models.view import ArchitectureView
from lemo.selection.layout import build_layout
from lemo.selection.predictor import ActivityPredictor
from lemo.selection.score_heads import ScoreHeads
from lemo.sparse import backward, forward
from lemo.sparse.bypass import Bypass
from lemo.sparse.parts import part
from lemo.sparse.precision import computes_in
from lemo.sparse.view import Rotary

HeldT = TypeVar("HeldT", ScoreHeads, ActivityPredictor, Bypass)
RUNTIME = "_lemo_runtime"
VIEW = "_lemo_view"
INDEX = "_lemo_index"
PACKS = "_lemo_packs"
# What CausalLM and decoder pass down by keyword, which wrappers pass again when they run a part of the model again.
TARGETS = "lemo_targets"
STATE = "lemo_state"


def leaves_out(module: Any, runtime: Runtime) -> bool:
    """Whether this call leaves tokens out: in training, or in evaluation where sparse evaluation was asked for."""
    mode = runtime.config.mode
    if module.training:
        return mode != "dense" or runtime.config.attend is not None
    return mode == "forward" and runtime.sparse_in_eval


class SparseCausalLM:
    """Computes the segmented loss when training with labels; everything else is the unmodified model."""

    # Plans and row counts are the host's; dynamo would trace into them and fail.
    @torch.compiler.disable
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        cls_forward = super().forward  # type: ignore[misc]
        arguments = _named(cls_forward, args, kwargs)
        labels, shifted = arguments.pop("labels", None), arguments.pop("shift_labels", None)
        if not self.training or (labels is None and shifted is None):
            return cls_forward(*args, **kwargs)
        if getattr(self, "_loss_function", None) is not None:
            raise ValueError(
                "this model has a loss function of its own, and lemo computes cross-entropy; take it away, or call the "
                "model without labels and compute the loss outside"
            )
        if _is_set(arguments.pop("logits_to_keep", 0)):
            raise ValueError("logits_to_keep and labels can't be combined in training; leave logits_to_keep out")
        num_items, as_tuple = arguments.pop("num_items_in_batch", None), arguments.pop("return_dict", None) is False
        runtime: Runtime = getattr(self, RUNTIME)
        if arguments.get("past_key_values") is None:
            # None is returned; and with one of its own transformers doesn't tell packed documents apart.
            arguments["use_cache"] = False
        if shifted is None:
            # A row predicts its successor; the last of a sequence predicts nothing.
            shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        targets = shifted.flatten()
        outputs = self.base_model(**arguments, **{TARGETS: targets != -100})
        hidden_ND = outputs.last_hidden_state.flatten(0, 1)
        targets = targets.to(hidden_ND.device)
        with part("loss"):
            loss = _loss(hidden_ND, self.get_output_embeddings(), targets, num_items, runtime)
        output = CausalLMOutputWithPast(loss=loss, logits=None, hidden_states=outputs.hidden_states)
        return output.to_tuple() if as_tuple else output

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            "a sparsified model doesn't run under nn.DataParallel, which Trainer uses where it sees several GPUs; "
            "start one process for each (torchrun), or show it one (CUDA_VISIBLE_DEVICES=0)"
        )


def _loss(hidden_ND: Tensor, head: nn.Module, targets: Tensor, num_items: Any, runtime: Runtime) -> Tensor:
    """Mean loss over the labels, or the `segments` policy's unbiased estimate of it from the drawn spans."""
    state = runtime.state
    spans = None if state is None or state.dense else state.spans
    if spans is None:
        return segmented_cross_entropy(hidden_ND, head, targets, num_items=num_items)
    if num_items is None:
        num_items = (targets != -100).sum().clamp(min=1)
    parts = [
        weight
        * segmented_cross_entropy(hidden_ND, head, targets.where(spans.weight == weight, -100), num_items=num_items)
        for weight in spans.weights
    ]
    return torch.stack(parts).sum()


class SparseDecoder:
    """Notes documents and blocks of the batch before the layers run."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        cls_forward = super().forward  # type: ignore[misc]
        runtime: Runtime = getattr(self, RUNTIME)
        runtime.state = None
        targets = kwargs.pop(TARGETS, None)
        sparse = leaves_out(self, runtime)
        arguments = _named(cls_forward, args, kwargs)
        mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
        cache = arguments.get("past_key_values")
        cached = cache is not None and cache.get_seq_length() > 0
        if sparse and self.training and cache is not None and not torch.is_grad_enabled():
            # `generate` between steps.
            return cls_forward(*args, **kwargs)
        if cached and sparse:
            raise ValueError(
                "tokens can't be left out with a filled key/value cache; pass past_key_values=None (PEFT's prefix "
                "tuning fills one: use LoRA or prompt tuning)"
            )
        may_need_mask = not getattr(self, PACKS) and mask is None and positions is not None and not cached
        if not sparse and not may_need_mask:
            return cls_forward(*args, **kwargs)
        tokens = arguments.get("input_ids")
        tokens = arguments["inputs_embeds"] if tokens is None else tokens
        B, T = tokens.shape[:2]
        layout = build_layout(B, T, runtime.config.tokens_per_block, tokens.device, mask, positions)
        if sparse:
            cls_forward = functools.partial(_with_all_of_a_pass, self, runtime, tokens.device, cls_forward)
            state = runtime.begin(layout, self.training, targets)
            # Not as it is: FSDP copies the dataclasses that it finds.
            arguments |= {"past_key_values": None, "use_cache": False, STATE: lambda: state}
            if state.attend is not None:
                with attention_by_lists(self.config):
                    return cls_forward(**arguments)
            if runtime.config.mode == "backward" and needs_no_mask(
                layout,
                getattr(self.layers[0], VIEW),
                self.config._attn_implementation,
                computes_in(tokens.device.type, self.dtype),
            ):
                state.by_bounds = True
                with documents_by_bounds(self.config):
                    return cls_forward(**arguments)
        if layout.packed and may_need_mask:
            arguments["attention_mask"] = document_mask(layout.documents, tokens, self.config, self.dtype)
        return cls_forward(**arguments)


def _with_all_of_a_pass(decoder: Any, runtime: Runtime, device: torch.device, run: Any, **arguments: Any) -> Any:
    """The norm after the last layer, which sees every row, takes one pass too where it is recognised; and in `forward`
    mode, whose layers run LoRA's products in the pass itself, its matrices are cast for all layers at once."""
    norm = getattr(decoder, "norm", None)
    layers = decoder.layers if runtime.config.mode == "forward" else ()
    linears = (group for layer in layers for group in getattr(layer, VIEW).linears_by_input)
    # Offloaded parameters are nowhere yet; the tokens are where products will be.
    with fused((), [] if norm is None else [norm]), low_copies(linears, device, decoder.dtype):
        return run(**arguments)


def document_mask(documents: tuple[tuple[int, int], ...], tokens: Tensor, config: Any, dtype: torch.dtype) -> Tensor:
    """Causal mask [B, 1, T, T] that isolates packed documents, for architectures whose own masks don't.

    Bool for sdpa, additive otherwise, as transformers builds its own.

    Raises:
        ValueError: the attention implementation takes no explicit mask.
    """
    implementation = config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"packed documents of this architecture need attn_implementation 'sdpa' or 'eager', not '{implementation}'"
        )
    B, T = tokens.shape[:2]
    document = torch.empty(B * T, dtype=torch.int64)
    for index, (first, end) in enumerate(documents):
        document[first:end] = index
    document = document.view(B, T).to(tokens.device)
    allowed = (document[:, :, None] == document[:, None, :]).tril()[:, None]
    if implementation == "sdpa":
        return allowed
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


class SparseAttention:
    """Brings the attention function it was called with: a wrapper may run it, or its layer, again after the decoder has
    put its own back."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = super().forward  # type: ignore[misc]
        if CALL in kwargs:
            with attention_by_lists(self.config):
                return run(*args, **kwargs)
        if BOUNDS in kwargs:
            with documents_by_bounds(self.config):
                return run(*args, **kwargs)
        return run(*args, **kwargs)


class SparseLayer:
    """Runs one decoder layer with blocks left out."""

    # transformers' layer wrapper would checkpoint a layer that already stores its input only, and run it twice; so
    # it reads False here, and `forward` mode checkpoints by itself.
    @property
    def gradient_checkpointing(self: Any) -> bool:
        return False

    @gradient_checkpointing.setter
    def gradient_checkpointing(self: Any, value: bool) -> None:
        self.__dict__["gradient_checkpointing"] = value

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        cls_forward = super().forward  # type: ignore[misc]
        runtime: Runtime = getattr(self, RUNTIME)
        if STATE not in kwargs:
            return cls_forward(hidden_states, *args, **kwargs)
        # Its own pass's, where a wrapper runs it again after another pass.
        state: BatchState = kwargs.pop(STATE)()
        if args:
            kwargs = _named(functools.partial(cls_forward, hidden_states), args, kwargs)
        if runtime.config.mode == "backward":
            return _run_backward(self, hidden_states, state, cls_forward, kwargs)
        if runtime.config.mode == "dense":
            return _run_dense(self, hidden_states, state, cls_forward, kwargs)
        return _run_forward(self, hidden_states, state, cls_forward, kwargs)


def _run_forward(layer: Any, hidden: Tensor, state: BatchState, cls_forward: Any, kwargs: dict[str, Any]) -> Tensor:
    runtime: Runtime = getattr(layer, RUNTIME)
    view: ArchitectureView = getattr(layer, VIEW)
    index: int = getattr(layer, INDEX)
    attend = _attend_call(layer, state)
    call = forward.ForwardCall(
        view,
        state.layout,
        _rotary(kwargs, state),
        runtime.config,
        index,
        lambda x: view.attention(x, **kwargs),
        _here(runtime.bypasses.get((index, "attention")), hidden),
        _here(runtime.bypasses.get((index, "mlp")), hidden),
        _here(cast("ScoreHeads | None", runtime.predictors.get((index, "attention"))), hidden),
        _here(cast("ActivityPredictor | None", runtime.predictors.get((index, "mlp"))), hidden),
        _checkpoints(layer),
        None if attend is None else attend.attend_kept,
    )
    # Outside `run`: a checkpointed recomputation finds the plans of the first run.
    plans = forward.ForwardPlans(_dropout_seed(view))

    def run(x: Tensor) -> Tensor:
        if state.dense:
            return cls_forward(x, **kwargs)
        return forward.run_layer(x, call, plans)

    out = _checkpointed(layer, run, hidden)
    if plans.attention is not None and plans.mlp is not None:
        runtime.record(index, plans.attention, plans.mlp)
        if layer.training:
            runtime.observe(state, index, plans.attention, plans.mlp)
    _record_lists(layer, attend)
    return out


def _here(module: HeldT | None, hidden: Tensor) -> HeldT | None:
    """A layer's predictor or frozen bypass, which no submodule holds, where the layer has been moved since."""
    if module is not None and module.device != hidden.device:
        module.to(hidden.device)
    return module


def _run_dense(layer: Any, hidden: Tensor, state: BatchState, cls_forward: Any, kwargs: dict[str, Any]) -> Tensor:
    """The unmodified layer, whose attention goes by lists unless everything is kept."""
    call = _attend_call(layer, state)
    if call is None:
        return _checkpointed(layer, lambda x: cls_forward(x, **kwargs), hidden)
    view: ArchitectureView = getattr(layer, VIEW)

    def run(x: Tensor) -> Tensor:
        with view.fused():
            return cls_forward(x, **kwargs, **{CALL: call})

    out = _checkpointed(layer, run, hidden)
    _record_lists(layer, call)
    return out


def _checkpointed(layer: Any, run: Any, hidden: Tensor) -> Tensor:
    """`run(hidden)`, run again in the backward if the model is checkpointed."""
    return layer._gradient_checkpointing_func(run, hidden) if _checkpoints(layer) else run(hidden)


def _checkpoints(layer: Any) -> bool:
    return layer.__dict__.get("gradient_checkpointing", False) and layer.training and torch.is_grad_enabled()


def _attend_call(layer: Any, state: BatchState) -> AttendCall | None:
    """Made outside of what is run again: the second run finds the first one's lists."""
    if state.attend is None:
        return None
    index: int = getattr(layer, INDEX)
    return AttendCall(
        state, state.attend.of_layer(index), getattr(layer, VIEW).window, lambda: state.draws(index).getrandbits(63)
    )


def _record_lists(layer: Any, call: AttendCall | None) -> None:
    if call is not None and call.grid is not None and call.lists is not None:
        getattr(layer, RUNTIME).record_lists(getattr(layer, INDEX), call.grid, call.lists)


def _run_backward(layer: Any, hidden: Tensor, state: BatchState, cls_forward: Any, kwargs: dict[str, Any]) -> Tensor:
    runtime: Runtime = getattr(layer, RUNTIME)
    view: ArchitectureView = getattr(layer, VIEW)
    index: int = getattr(layer, INDEX)
    if state.by_bounds:
        kwargs = {**kwargs, BOUNDS: state.bounds_of(view.window)}
    attend = _attend_call(layer, state)
    if attend is not None:
        kwargs = {**kwargs, CALL: attend}
    call = backward.BackwardCall(
        view=view,
        layout=state.layout,
        choose=functools.partial(runtime.choose, state, index),
        dense=lambda x: cls_forward(x, **kwargs),
        attend=lambda x: view.attention(x, **kwargs),
        rotary=_rotary(kwargs, state),
        kv_all=state.dense or runtime.config.kv_gradient == "all",
        compensate=runtime.config.by_energy and runtime.config.compensate,
        tile_bytes=int(runtime.config.tile_mib * 2**20),
        seed=_dropout_seed(view),
        attend_rows=None if attend is None else attend.attend,
    )
    out = backward.run_layer(hidden, call)
    _record_lists(layer, attend)
    return out


def _dropout_seed(view: ArchitectureView) -> int | None:
    """A new seed for one layer call, None without dropout.

    From torch's stream, so that `torch.manual_seed` and checkpointed random states reproduce the masks.
    """
    return int(torch.randint(2**31, ())) if view.has_dropout else None


def _rotary(kwargs: dict[str, Any], state: BatchState) -> Rotary:
    """(cos, sin) of all B·T rows; transformers may give them for one sequence, broadcast over the batch."""
    pair = kwargs.get("position_embeddings")
    if pair is None:
        return None
    # The layers of a model share one pair, so they share its flattened copy too.
    if state.rotary is None or state.rotary[0] is not pair:
        B, T = state.layout.shape
        cos, sin = (x.expand(B, T, x.shape[-1]).reshape(B * T, -1).contiguous() for x in pair)
        state.rotary = (pair, (cos, sin))
    return state.rotary[1]


def _named(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name, a `**kwargs` parameter's merged in."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        parameter = bound.signature.parameters[name]
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        else:
            named[name] = value
    return named


def _is_set(logits_to_keep: Any) -> bool:
    return not (isinstance(logits_to_keep, int) and logits_to_keep == 0)
