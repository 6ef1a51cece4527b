"""What lets the tests' tiny blocks run."""

from __future__ import annotations

import pytest

from lemo.models import surgery
from lemo.selection import attend_mass
from lemo.sparse import attend as sparse_attend


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two tokens go through torch on a GPU too, which refuses them otherwise."""
    for module in (sparse_attend, attend_mass):
        monkeypatch.setattr(module, "block_sparse_backend", lambda *_: "torch")
    monkeypatch.setattr(surgery, "check_listed_block", lambda *_: None)
