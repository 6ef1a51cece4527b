"""The layout's rules hold, and the checker that says so notices when they don't."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from layering import MAX_LINES, RANK, violations

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "lemo"


def tree(tmp_path: Path, files: dict[str, str]) -> Path:
    package = tmp_path / "lemo"
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return package


def test_imports_go_only_downward_and_files_stay_short() -> None:
    assert violations(PACKAGE) == []


def test_the_checker_sees_the_whole_package() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms - {"__init__"} <= RANK.keys()
    assert {"config", "models", "sparse", "training", "cli"} <= rooms


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("loss/a.py", "import lemo.training", "loss imports lemo.training"),
        ("loss/a.py", "from lemo.training.job import finetune", "imports go only downward"),
        ("loss/a.py", "from lemo import training", "lies in training"),
        ("loss/a.py", "from lemo import sparsify", "lies in lemo"),
        ("loss/a.py", "from ..training import job", "lies in training"),
        ("loss/a.py", "from .. import training", "lies in training"),
        ("loss/deep/a.py", "from ...cli import main", "lies in cli"),
        ("loss/a.py", "def f():\n    from lemo.models import view", "a.py:2: loss imports lemo.models.view"),
        ("loss/a.py", "class A:\n    def f(self):\n        import lemo.data.jsonl", "a.py:3"),
        (
            "loss/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lemo.models import view",
            "a.py:3",
        ),
        ("loss/a.py", "from importlib import import_module\nx = import_module('lemo.models')", "a.py:2"),
        ("config.py", "from lemo.types import TokenPlan", "config imports lemo.types"),
        ("extra/a.py", "", "room extra isn't in the order"),
        ("kernels/a.py", "import transformers", "a kernel imports transformers"),
        ("kernels/a.py", "from torch.nn import Module", "a kernel imports torch.nn.Module"),
        ("kernels/a.py", "from torch import nn\nclass A(nn.Module): ...", "a kernel uses nn.Module"),
        (
            "kernels/a.py",
            "import torch\nclass A(torch.autograd.Function): ...",
            "a kernel uses torch.autograd.Function",
        ),
        ("config_io.py", "import torch", "before the configuration is checked"),
        (
            "cli/main.py",
            "try:\n    from torch import nn\nexcept ImportError: ...",
            "before the configuration is checked",
        ),
        ("data/a.py", "x = 1\n" * (MAX_LINES + 1), f"{MAX_LINES + 1} lines"),
    ],
)
def test_the_checker_notices(tmp_path: Path, name: str, text: str, message: str) -> None:
    found = violations(tree(tmp_path, {"training/job.py": "", "models/view.py": "", name: text}))
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "training/a.py",
            "import lemo\nfrom lemo.models import view\nfrom . import job\nfrom ..types import TokenPlan",
        ),
        ("__init__.py", "from lemo.config import SparsityConfig\ndef f():\n    from lemo import models"),
        ("cli/main.py", "def f():\n    import torch"),
        ("loss/a.py", "import lemonade\nfrom torch import nn\nclass A(nn.Module): ..."),
        ("kernels/a.py", "import torch\nfrom torch import Tensor\nfrom torch.nn import functional as F"),
        ("data/a.py", "x = 1\n" * MAX_LINES),
    ],
)
def test_the_checker_accepts(tmp_path: Path, name: str, text: str) -> None:
    assert violations(tree(tmp_path, {"training/job.py": "", "models/view.py": "", name: text})) == []


def test_the_readme_is_short_and_its_commands_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count("\n") < 200
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test", "test-slow", "lint", "test-gpu", "bench", "clean"} <= targets
    named = set(re.findall(r"\bmake ([a-z-]+)", readme))
    assert {"demo", "test"} <= named <= targets


LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)|(?:src|href)=\"([^\"#]+)\"")


@pytest.mark.parametrize(
    "page", sorted(p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
)
def test_every_file_a_page_links_to_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for match in LINK.finditer(text):
        target = match.group(1) or match.group(2)
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"
