"""Finding and reading documents: Python's own library, an installed package, a folder, a file, a glob, or JSONL.

A document's *name* is relative to where the search began, so that it (and the split made from its hash) is the
same on every machine. Files are read when they are needed, JSONL at once, because one file holds many documents.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import json
import os
import pkgutil
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from lemo.data.jsonl import Content, Conversation, Pair, parse_lines
from lemo.errors import UserError

# Tests, installed packages, obsolete tools, and generated tables, which would crowd out real code.
STDLIB_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "lib2to3", "__pycache__",
     "encodings", "pydoc_data"}
)  # fmt: skip
_PACKAGE = "package:"
# A package's helpers for tests hold single tables larger than the rest of their folder (torch.testing's 1 MB).
_PACKAGE_SKIPPED = STDLIB_SKIPPED | {"testing"}


@dataclass(frozen=True)
class Document:
    """One document, found but not necessarily read.

    Attributes:
        name: relative to the search's root, `/`-separated; JSONL adds `:line`.
        where: file, or file:line, for messages.
        path: the file it is read from; None if `content` is already there.
        content: what a JSONL line held.
    """

    name: str
    where: str
    path: Path | None = None
    content: Content | None = None

    def read(self) -> Content:
        """The document's content.

        Raises:
            UserError: the file can't be read, or isn't UTF-8 text.
        """
        if self.content is not None:
            return self.content
        assert self.path is not None
        return _read_text(self.path)


@dataclass(frozen=True)
class Found:
    """What a search found: documents sorted by name, and remarks for the report."""

    documents: tuple[Document, ...]
    notes: tuple[str, ...] = ()


def digest(content: Content) -> str:
    """SHA-256 of the content; equal exactly when two documents hold the same text."""
    match content:
        case Pair(prompt, completion):
            canonical = json.dumps(["pair", prompt, completion])
        case Conversation(messages):
            canonical = json.dumps(["messages", messages], sort_keys=True)
        case _:
            canonical = json.dumps(["text", content])
    return hashlib.sha256(canonical.encode()).hexdigest()


def find_documents(source: str, setting: str = "data.train") -> Found:
    """Documents that `source` names.

    Args:
        source: `stdlib`, `package:NAME` (the sources of an installed package, which isn't imported; names begin with
            the package's), a folder (walked, hidden entries skipped), a file, or a glob (`**` descends).
            A `.jsonl` file holds one document a line; any other file is one document.
        setting: the configuration key that `source` came from, for messages.

    Raises:
        UserError: nothing is there, or a JSONL file is malformed.
    """
    if source == "stdlib":
        root, paths, notes = _find_stdlib(setting)
    elif source.startswith(_PACKAGE):
        root, paths, notes = _find_package(source.removeprefix(_PACKAGE), setting)
    else:
        root, paths, notes = _find_paths(source, setting)
    documents: list[Document] = []
    for path in paths:
        name = _clean(path.relative_to(root).as_posix())
        if path.suffix.lower() == ".jsonl":
            lines, remarks = _read_jsonl(path, name)
            documents += lines
            notes += remarks
        else:
            documents.append(Document(name=name, where=_clean(str(path)), path=path))
    documents.sort(key=lambda document: document.name)
    return Found(tuple(documents), tuple(notes))


def _find_stdlib(setting: str) -> tuple[Path, list[Path], list[str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = _python_sources(root, STDLIB_SKIPPED)
    if not paths:
        raise UserError(
            f"{setting}: stdlib: this Python has no library sources on disk; give a folder of text files instead"
        )
    return root, paths, []


def _find_package(name: str, setting: str) -> tuple[Path, list[Path], list[str]]:
    # A dotted name would be imported up to its last part.
    if not name.isidentifier():
        raise UserError(f"{setting}: {_PACKAGE}{name}: give a package's name as in `import NAME`, without dots")
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a module that was made by hand
        spec = None
    if spec is None:
        near = get_close_matches(name, [module.name for module in pkgutil.iter_modules() if module.ispkg], n=1)
        hint = f" (did you mean {_PACKAGE}{near[0]}?)" if near else ""
        raise UserError(f"{setting}: no package {name} is installed here{hint}; install it, or give a folder of text")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    paths = _python_sources(folders[0], _PACKAGE_SKIPPED) if len(folders) == 1 and folders[0].is_dir() else []
    if not paths:
        raise UserError(
            f"{setting}: {_PACKAGE}{name} isn't one folder of Python sources; give another package or a folder of text"
        )
    return folders[0].parent, paths, []


def _python_sources(root: Path, skipped: Iterable[str]) -> list[Path]:
    return [path for path in _walk(root, skipped)[0] if path.suffix == ".py"]


def _find_paths(source: str, setting: str) -> tuple[Path, list[Path], list[str]]:
    path = Path(source).expanduser()
    if path.is_dir():
        paths, hidden = _walk(path, frozenset({"__pycache__"}))
        if not paths:
            raise UserError(f"{setting}: the folder {source} holds no files; give a folder with text or .jsonl files")
        return path, paths, [f"{source}: {hidden} hidden files and folders not read"] if hidden else []
    if path.is_file():
        return path.parent, [path], []
    if glob.has_magic(source):
        expanded = os.path.expanduser(source)
        matches = sorted(Path(match) for match in glob.glob(expanded, recursive=True) if os.path.isfile(match))
        if not matches:
            raise UserError(
                f"{setting}: the glob {source} matches no file (from {os.getcwd()}); "
                "quote it in the shell, and use ** to descend into folders"
            )
        return _glob_root(expanded), matches, []
    raise UserError(
        f"{setting}: {source} does not exist{_nearest(path)}; give stdlib, package:NAME, a folder, a file or a glob"
    )


def _glob_root(pattern: str) -> Path:
    fixed: list[str] = []
    for part in Path(pattern).parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return Path(*fixed)


def _walk(root: Path, skipped: Iterable[str]) -> tuple[list[Path], int]:
    """Files under `root`, sorted, and how many hidden entries were passed over."""
    paths: list[Path] = []
    hidden = 0

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: can't be read ({error.strerror}); check its permissions") from error

    for folder, folders, files in os.walk(root, onerror=refuse):
        hidden += sum(name.startswith(".") for name in folders + files)
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        paths += [Path(folder, name) for name in files if not name.startswith(".")]
    return sorted(paths), hidden


def _nearest(path: Path) -> str:
    try:
        siblings = os.listdir(path.parent)
    except OSError:
        return ""
    near = get_close_matches(path.name, siblings, n=1)
    return f" (did you mean {path.with_name(near[0])}?)" if near else ""


def _read_text(path: Path) -> str:
    remedy = f"convert it to UTF-8, or leave it out with a glob such as '{path.parent}/**/*.txt'"
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); check the file, or {remedy}") from error
    if b"\0" in raw:
        raise UserError(f"{path}: is a binary file (a zero byte at offset {raw.index(0)}); {remedy}")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); {remedy}") from error


def _read_jsonl(path: Path, name: str) -> tuple[list[Document], list[str]]:
    documents: list[Document] = []
    ignored: dict[str, int] = {}
    for line, content, unused in parse_lines(_read_text(path), _clean(str(path))):
        documents.append(Document(f"{name}:{line}", _clean(f"{path}:{line}"), content=content))
        for key in unused:
            ignored[key] = ignored.get(key, 0) + 1
    if not documents:
        raise UserError(f"{path}: holds no lines; a .jsonl file holds one JSON object on each line")
    notes = [f"{name}: key {key!r} ignored on {count} lines" for key, count in sorted(ignored.items())]
    return documents, notes


def _clean(text: str) -> str:
    """File names need not be text; names in reports and tables must be."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
