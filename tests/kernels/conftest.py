"""Kernels run on the tests' device; on the CPU in Triton's interpreter, which needs one repair."""

from __future__ import annotations

import os
from typing import Any

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
