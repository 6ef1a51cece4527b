"""Reads the source as text and says where it breaks the rules of its layout (DESIGN 5), without importing it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

# Rooms from the lowest to the highest; a room imports itself and lower ones. Rooms of one line don't know each other.
ORDER: tuple[tuple[str, ...], ...] = (
    ("config", "types"),
    ("errors",),
    ("config_io",),
    ("kernels",),
    ("selection",),
    ("loss",),
    ("sparse",),
    ("models",),
    ("lemo",),  # the package itself, which offers what `models` holds
    ("memory",),
    ("data",),
    ("evaluation",),
    ("training",),
    ("calibration",),
    ("bench",),
    ("report",),
    ("cli",),
    ("__main__",),
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
MAX_LINES = 400
# What a kernel must not know: modules of models, and torch's nn.Module.
FORBIDDEN_IN_KERNELS = ("transformers", "peft", "accelerate", "torch.nn.Module", "torch.autograd.Function")
# Configuration mistakes are found before torch is imported.
TORCH_FREE = ("config", "config_io", "errors", "cli")
TORCH = ("torch", "transformers", "peft", "accelerate", "datasets")


def violations(package: Path) -> list[str]:
    """Every broken rule as `file:line: what`, sorted by file.

    Args:
        package: the folder `lemo`.
    """
    found: list[str] = []
    for file in sorted(package.rglob("*.py")):
        name = file.relative_to(package).as_posix()
        text = file.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > MAX_LINES:
            found.append(f"{name}:{lines}: {lines} lines, {MAX_LINES} at most")
        room = room_of(file, package)
        if room not in RANK:
            found.append(f"{name}:1: room {room} isn't in the order")
            continue
        tree = ast.parse(text)
        module_level = {id(node) for statement in tree.body for node in _at_import_time(statement)}
        for line, target, node in imports(tree, file, package):
            fault = _fault(room, target, lazy=id(node) not in module_level, package=package)
            if fault:
                found.append(f"{name}:{line}: {fault}")
    return found


def room_of(file: Path, package: Path) -> str:
    """The room a source file belongs to; the package's own `__init__` is room `lemo`."""
    parts = file.relative_to(package).with_suffix("").parts
    return "lemo" if parts == ("__init__",) else parts[0]


def imports(tree: ast.Module, file: Path, package: Path) -> Iterator[tuple[int, str, ast.AST]]:
    """(line, full dotted target, node) of each import, relative and lazy ones included, and of torch.nn.Module."""
    here = (package.name, *file.relative_to(package).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, node
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            module = ".".join((*base, *(node.module.split(".") if node.module else ())))
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}", node
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            if node.args and isinstance(first := node.args[0], ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value, node
        elif isinstance(node, ast.Attribute) and (dotted := _dotted(node)):
            # A use of an imported name, such as `nn.Module` after `from torch import nn`.
            yield node.lineno, f"={dotted}", node


def _fault(room: str, target: str, *, lazy: bool, package: Path) -> str | None:
    if target.startswith("="):
        used = target[1:]
        if room == "kernels" and used in (
            "nn.Module",
            "torch.nn.Module",
            "autograd.Function",
            "torch.autograd.Function",
        ):
            return f"a kernel uses {used}"
        return None
    if room == "kernels" and _starts(target, FORBIDDEN_IN_KERNELS):
        return f"a kernel imports {target}"
    if room in TORCH_FREE and not lazy and _starts(target, TORCH):
        return f"{room} imports {target}, before the configuration is checked"
    parts = target.split(".")
    if parts[0] != package.name:
        return None
    # `from lemo import training` names a room, `from lemo import sparsify` the package.
    wanted = parts[1] if len(parts) > 1 and _is_room(parts[1], package) else "lemo"
    if wanted == room or (wanted in RANK and RANK[wanted] < RANK[room]):
        return None
    return f"{room} imports {target}, which lies in {wanted}: imports go only downward"


def _is_room(name: str, package: Path) -> bool:
    return name in RANK or (package / name).is_dir() or (package / f"{name}.py").is_file()


def _starts(target: str, prefixes: tuple[str, ...]) -> bool:
    return any(target == prefix or target.startswith(f"{prefix}.") for prefix in prefixes)


def _called(node: ast.Call) -> str | None:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Attribute):
        left = _dotted(node.value)
        return left and f"{left}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None


def _at_import_time(statement: ast.stmt) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: not those inside functions, nor under `if TYPE_CHECKING`."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return
    if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
        return
    yield statement
    for child in ast.iter_child_nodes(statement):
        if isinstance(child, ast.stmt):
            yield from _at_import_time(child)
