"""Launches find what Triton would: whatever it compiles anew for is in the key."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend

from lemo.kernels import launching

NUMBERS = (-(2**40), -16, -1, 0, 1, 2, 16, 17, 2**31 - 1, 2**31, 2**31 + 16, 2**32, 2**62 + 1, 2**63, 2**63 + 16)


def test_arguments_of_one_key_are_compiled_alike() -> None:
    store = torch.zeros(64)
    tensors = [
        x for dtype in (torch.float32, torch.bfloat16, torch.int64) for x in (store.to(dtype), store.to(dtype)[1:])
    ]
    values: list[Any] = [*NUMBERS, *tensors, None, 1.0, 0.5]

    def compiled_for(x: Any) -> Any:
        return native_specialize_impl(BaseBackend, x, False, True, True)

    for one, other in itertools.combinations(values, 2):
        if launching.specialized(one) == launching.specialized(other):
            assert compiled_for(one) == compiled_for(other), (one, other)


def test_a_kernel_is_compiled_once_for_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Compiled] = []

    class Compiled:
        function, packed_metadata = "function", "metadata"

        def __init__(self) -> None:
            self.runs: list[tuple[Any, ...]] = []
            compiled.append(self)

        def run(self, *arguments: Any) -> None:
            self.runs.append(arguments)

    class Driver:
        class active:  # noqa: N801
            get_current_stream = staticmethod(lambda index: 77)

    class Kernel:
        def __init__(self) -> None:
            self.arg_names = ["X", "n", "D"]

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **options: Compiled()

    monkeypatch.setattr(launching, "CompiledKernel", Compiled)
    monkeypatch.setattr(launching, "_KNOWN", True)
    monkeypatch.setattr(launching, "driver", Driver)
    kernel, x = Kernel(), torch.zeros(8)
    for n in (5, 7, 16):
        launching.launch(kernel, (n,), x, n, D=8, num_warps=4)
    launching.launch(kernel, (5,), x.bfloat16(), 5, D=8, num_warps=4)
    launching.launch(kernel, (5,), x, 5, D=8, num_warps=8)
    launching.launch(kernel, (0, 3), x, 5, D=9, num_warps=8)
    assert [len(one.runs) for one in compiled] == [1, 0, 0, 0]
    assert compiled[0].runs == [(7, 1, 1, 77, "function", "metadata", None, None, None, x, 7, 8)]
    monkeypatch.setattr(launching, "_hooked", lambda: True)
    launching.launch(kernel, (5,), x, 5, D=8, num_warps=4)
    assert [len(one.runs) for one in compiled] == [1, 0, 0, 0, 0]
    # What a profiler had compiled is its own.
    launching.launch(kernel, (5,), x, 5, D=10, num_warps=4)
    monkeypatch.setattr(launching, "_hooked", lambda: False)
    launching.launch(kernel, (5,), x, 5, D=10, num_warps=4)
    assert [len(one.runs) for one in compiled] == [1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("hook", [None, lambda metadata: None], ids=["none", "function"])
def test_hooks_may_be_whatever_triton_calls(hook: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not launching._hooked()
    monkeypatch.setattr(launching.triton.knobs.runtime, "launch_exit_hook", None)
    monkeypatch.setattr(launching.triton.knobs.runtime, "launch_enter_hook", hook)
    assert launching._hooked() == (hook is not None)
