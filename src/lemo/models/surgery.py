"""`sparsify` and `restore`: an instance's class is swapped for a subclass of it, and swapped back (DESIGN 4.7).

State-dict keys, hooks, PEFT wrapping and checkpointing stay as they are; the subclass keeps the class's name, which
FSDP wrapping and `save_pretrained` look up. Rejected: per-model copies of modeling files, global monkey-patches.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lemo.config import Attend, BranchSelection, SparsityConfig
from lemo.kernels.dispatch import check_listed_block
from lemo.models.architectures import Architecture, architecture_of
from lemo.models.attend import refuse_dropout
from lemo.models.calibration import check_model, fill_in, fingerprint, following_of, read_calibration
from lemo.models.mixins import INDEX, PACKS, RUNTIME, VIEW, SparseAttention, SparseCausalLM, SparseDecoder, SparseLayer
from lemo.models.runtime import Runtime, flag
from lemo.models.view import ArchitectureView
from lemo.sparse.bypass import Bypass
from lemo.types import Key

# Name of the bypasses that train, in the CausalLM.
BYPASSES = "lemo_bypasses"
_ATTRIBUTES = (RUNTIME, VIEW, INDEX, PACKS)


def sparsify(model: Any, config: SparsityConfig) -> Any:
    """Makes a model leave blocks of tokens out while it trains.

    Works in place on a transformers CausalLM, or on a PEFT model around one, before or after wrapping (with bypasses
    that train after it: PEFT freezes what it finds). In training
    mode a call with labels returns the segmented loss and no logits; in evaluation mode the model is unmodified.

    Args:
        model: CausalLM or PEFT model.
        config: what to leave out.

    Returns:
        The same object.

    Raises:
        ValueError: unsupported architecture (lists the supported ones), not a CausalLM, already sparsified, or
            per-layer settings whose length isn't the number of layers, or a calibration that is damaged or
            another model's, or attention dropout with `attend`, or on a GPU blocks that its kernels don't take, or
            `mode: auto`, or a `forward` that somebody has replaced.
    """
    if config.mode == "auto":
        raise ValueError("mode auto needs the data, which `lemo finetune` has; name a mode here (docs/quality.md)")
    causal_lm = _causal_lm(model)
    if get_runtime(model) is not None:
        raise ValueError("this model is already sparsified; call lemo.restore(model) first")
    row = architecture_of(causal_lm.config.model_type)
    decoder = causal_lm.get_submodule(row.decoder)
    layers = list(decoder.layers)
    calibration = following = None
    if config.calibration is not None:
        directory = Path(config.calibration)
        calibration = read_calibration(directory)
        embedding = causal_lm.get_input_embeddings()
        found = fingerprint(layers, embedding)
        check_model(directory, calibration.facts, found, embedding.weight.dtype, len(layers))
        following = following_of(config, calibration)
        config = fill_in(config, calibration)
    for name in ("attention", "mlp", "attend"):
        _check_per_layer(name, getattr(config, name), len(layers))
    if config.attend is not None:
        refuse_dropout(getattr(causal_lm.config, "attention_dropout", 0.0))
        check_listed_block(config.attend.block, _device_of(layers[0]))
    for module in (causal_lm, decoder, *layers):
        _refuse_other_forward(module)
    runtime = Runtime(config, len(layers), following=following)
    setattr(causal_lm, RUNTIME, runtime)
    _swap(causal_lm, SparseCausalLM)
    if calibration is not None:
        runtime.predictors = {
            key: predictor.to(_device_of(layers[key[0]])) for key, predictor in calibration.predictors.items()
        }
        hold_bypasses(causal_lm, calibration.bypasses)
    setattr(decoder, RUNTIME, runtime)
    setattr(decoder, PACKS, row.packs)
    _swap(decoder, SparseDecoder)
    if config.mode != "dense" or config.attend is not None:
        for index, layer in enumerate(layers):
            _sparsify_layer(layer, index, row, runtime)
    return model


def restore(model: Any) -> Any:
    """Undoes `sparsify` exactly, in place, and returns the model.

    Raises:
        ValueError: the model isn't sparsified.
    """
    if get_runtime(model) is None:
        raise ValueError("this model isn't sparsified; there is nothing to restore")
    causal_lm = _causal_lm(model)
    causal_lm._modules.pop(BYPASSES, None)
    for module in causal_lm.modules():
        if RUNTIME in module.__dict__:
            _give_class(module, type(module).__mro__[2])
            for name in _ATTRIBUTES:
                module.__dict__.pop(name, None)
    return model


def get_runtime(model: Any) -> Runtime | None:
    """A sparsified model's runtime (statistics, plans, random state), None for any other model."""
    for module in model.modules():
        runtime = module.__dict__.get(RUNTIME)
        if runtime is not None:
            return runtime
    return None


def hold_bypasses(model: Any, bypasses: Mapping[Key, Bypass]) -> None:
    """Gives a sparsified model its bypasses, in place of those it has.

    Those that train become parameters of the CausalLM, under `BYPASSES`; frozen ones leave its state dict as it is.

    Args:
        model: sparsified.
        bypasses: by (layer, branch).
    """
    runtime, causal_lm = _runtime(model), _causal_lm(model)
    layers = causal_lm.get_submodule(architecture_of(causal_lm.config.model_type).decoder).layers
    runtime.bypasses = {key: bypass.to(_device_of(layers[key[0]])) for key, bypass in bypasses.items()}
    if runtime.config.train_bypass:
        named = {f"{layer}_{branch}": bypass for (layer, branch), bypass in runtime.bypasses.items()}
        setattr(causal_lm, BYPASSES, nn.ModuleDict(named).requires_grad_(True))


@contextmanager
def dense(model: Any) -> Iterator[None]:
    """Inside, a sparsified model trains with every token kept: exact gradients, still at one stored tensor a layer."""
    with flag(_runtime(model), "dense_only", True):
        yield


@contextmanager
def sparse_evaluation(model: Any) -> Iterator[None]:
    """Inside, `forward` mode leaves blocks out in evaluation mode too; the default is the dense model."""
    with flag(_runtime(model), "sparse_in_eval", True):
        yield


def backbone_hidden(model: Any, **inputs: Any) -> tuple[Tensor, nn.Module]:
    """Hidden states after the final norm, [B, T, D], and the module that maps them to logits.

    Args:
        model: a supported CausalLM, sparsified or not, or a PEFT model around one.
        inputs: as for the model, without labels.
    """
    causal_lm = _causal_lm(model)
    outputs = causal_lm.base_model(**{**inputs, "use_cache": False})
    return outputs.last_hidden_state, causal_lm.get_output_embeddings()


def _runtime(model: Any) -> Runtime:
    runtime = get_runtime(model)
    if runtime is None:
        raise ValueError("this model isn't sparsified; call lemo.sparsify(model, config) first")
    return runtime


def _causal_lm(model: Any) -> Any:
    """The transformers CausalLM inside whatever wraps it (PEFT, DDP)."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    if not isinstance(inner, PreTrainedModel) or inner.get_output_embeddings() is None:
        raise ValueError(
            f"lemo needs a transformers causal language model or a PEFT model around one, got {type(inner).__name__}; "
            "load it with AutoModelForCausalLM"
        )
    return inner


def _sparsify_layer(layer: Any, index: int, row: Architecture, runtime: Runtime) -> None:
    setattr(layer, RUNTIME, runtime)
    setattr(layer, VIEW, ArchitectureView(layer, row))
    setattr(layer, INDEX, index)
    _swap(layer, SparseLayer)
    if runtime.config.mode != "forward":
        attention: Any = layer.get_submodule(row.attention)
        # A wrapper that checkpoints runs what it holds again.
        attention = getattr(attention, "_checkpoint_wrapped_module", attention)
        setattr(attention, RUNTIME, runtime)
        _swap(attention, SparseAttention)


def _device_of(layer: nn.Module) -> torch.device:
    return next(layer.parameters()).device


def _refuse_other_forward(module: Any) -> None:
    """Raises ValueError where an instance's own `forward` would hide the one that leaves tokens out."""
    if "forward" in module.__dict__ and not _is_dispatched(module):
        raise ValueError(
            f"{type(module).__name__}.forward has been replaced on this instance, which would hide what lemo.sparsify "
            "does (Trainer and accelerate leave that on a model they have prepared, Liger on one it has patched); call "
            "accelerator.unwrap_model(model, keep_fp32_wrapper=False) or load the model anew, then sparsify"
        )


def _is_dispatched(module: Any) -> bool:
    """Whether accelerate's hooks (`device_map`) stand before the class's own `forward`."""
    return getattr(module.__dict__.get("_old_forward"), "__func__", None) is type(module).forward


def _swap(module: Any, mixin: Any) -> None:
    cls: Any = type(module)
    _give_class(module, _subclass(cls, mixin))


def _give_class(module: Any, cls: Any) -> None:
    """Another class, whose `forward` accelerate's hooks then stand before."""
    dispatched = _is_dispatched(module)
    module.__class__ = cls
    if dispatched:
        module._old_forward = MethodType(cls.forward, module)


@functools.cache
def _subclass(cls: Any, mixin: Any) -> Any:
    """`cls` with `mixin` in front, under the same name, module and forward signature."""

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # TRL and accelerate keep this function bound to a model that has been restored since.
        return (mixin if isinstance(self, mixin) else cls).forward(self, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        # A class made at run time can't be looked up by its name.
        return _anew, (cls, mixin), *cls.__reduce_ex__(self, protocol)[2:]

    names = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "forward": forward,
        "__reduce_ex__": reduce,
    }
    return type(cls.__name__, (mixin, cls), names)


def _anew(cls: Any, mixin: Any) -> Any:
    """An empty instance, which `pickle` and `copy` fill."""
    made = _subclass(cls, mixin)
    return made.__new__(made)


def _check_per_layer(name: str, selection: BranchSelection | Attend | None, layers: int) -> None:
    for kind in ("keep", "threshold", "density"):
        value = getattr(selection, kind, None)
        if isinstance(value, tuple) and len(value) != layers:
            raise ValueError(f"{name}.{kind} has {len(value)} numbers and the model {layers} layers; give one a layer")
