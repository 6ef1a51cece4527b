"""Shared pytest set-up: one thread, fixed seeds, exact fp32 matmuls, and the device the tests run on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

# Triton asks for this when it is first imported, which torch may do.
if os.environ.get("LEMO_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

# Kernels run on the tests' device; on the CPU in Triton's interpreter, which needs one repair.
if os.environ.get("TRITON_INTERPRET") == "1":
    try:
        from triton.runtime import interpreter
    except ImportError:
        pass
    else:
        patch_tensor: Any = interpreter._patch_lang_tensor

        def with_index(tensor: Any, scope: Any) -> None:
            """Triton 3.6 has int() of an array of one element, which NumPy 2.4 refuses; loop bounds are such arrays."""
            patch_tensor(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        interpreter._patch_lang_tensor = with_index


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Every test starts from the same seed, on one thread, TF32 off, and leaves the default dtype alone."""
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32, "a test changed the default dtype"


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, or what LEMO_TEST_DEVICE names (`make test-gpu`: cuda); tests marked `gpu` get CUDA."""
    wanted = os.environ.get("LEMO_TEST_DEVICE", "cpu")
    if request.node.get_closest_marker("gpu") is not None:
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        wanted = "cuda"
    if wanted == "cuda" and not torch.cuda.is_available():
        pytest.fail("LEMO_TEST_DEVICE=cuda, but torch finds no CUDA device")
    return torch.device(wanted)
