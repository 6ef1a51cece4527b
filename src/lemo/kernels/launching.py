"""Launches of Triton kernels that cost the host less than `kernel[grid](...)`.

Triton finds what a kernel was compiled to by binding arguments by name and making text of its options, 5 to 9 µs where
the rest of a launch takes 2; at a few thousand tokens the host sets the pace. Here it is found by a small key of what
Triton compiles anew for. A kernel's first launch, Triton's interpreter and other versions take Triton's own way.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

# Whose compiled kernels are known to run so: all arguments in order, constants too. ROCm compiles for tensors' sizes.
_KNOWN = triton.__version__.startswith("3.6.") and torch.version.hip is None
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int, num_stages: int | None = None, **constants: Any
) -> None:
    """Runs a kernel; where the grid is empty, nothing.

    Args:
        kernel: decorated by `triton.jit`.
        grid: programs along up to three axes.
        arguments: in the kernel's order; the first is a tensor, on whose device it runs.
        num_warps, num_stages: Triton's options.
        constants: `tl.constexpr` arguments, in the kernel's order and after all others.
    """
    if 0 in grid:
        return
    index = arguments[0].get_device()
    # Kernels live as long as their modules.
    key = (id(kernel), index, num_warps, num_stages, *constants.values(), *map(specialized, arguments))
    # Triton launches on the current device, whatever the tensors' is.
    with torch.cuda.device_of(arguments[0]):
        compiled, hooked = _compiled.get(key), _hooked()
        if compiled is not None and not hooked:
            compiled.run(
                *(*grid, 1, 1)[:3], driver.active.get_current_stream(index), compiled.function,
                compiled.packed_metadata, None, None, None, *arguments, *constants.values(),
            )  # fmt: skip
            return
        options = {"num_warps": num_warps} | ({} if num_stages is None else {"num_stages": num_stages})
        compiled = kernel[grid](*arguments, **constants, **options)
    # What was compiled for a profiler is its own.
    instrumented = hooked or triton.knobs.compilation.instrumentation_mode
    if _KNOWN and not instrumented and isinstance(compiled, CompiledKernel):
        assert kernel.arg_names[len(arguments) :] == list(constants), "constants come last, in the kernel's order"
        _compiled[key] = compiled


def specialized(x: Any) -> Any:
    """What kernels are compiled anew for: a tensor's dtype and alignment; whether a number is 1, a multiple of 16, or
    beyond 32 bits, with or without a sign."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if type(x) is int:
        return x % 16 == 0 if 1 < x < 2**31 else (x == 1, x % 16 == 0, -(2**31) <= x < 2**31, x < 2**63)
    return type(x)


def _hooked() -> bool:
    """Whether somebody, a profiler for one, wants to hear of launches."""
    hooks = triton.knobs.runtime
    return bool(_calls(hooks.launch_enter_hook) or _calls(hooks.launch_exit_hook))


def _calls(hook: Any) -> Any:
    """Of a chain its calls; somebody may have put None or a function in its place."""
    return hook is not None and getattr(hook, "calls", True)
