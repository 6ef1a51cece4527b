"""Finding and reading documents, and every way in which that goes wrong."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from lemo.data.documents import STDLIB_SKIPPED, digest, find_documents
from lemo.data.jsonl import Conversation, Pair
from lemo.errors import UserError


def _write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _jsonl(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def _names(source: object) -> list[str]:
    return [document.name for document in find_documents(str(source)).documents]


def test_stdlib_holds_python_sources_and_none_of_the_skipped() -> None:
    found = find_documents("stdlib").documents
    names = [document.name for document in found]
    assert "argparse.py" in names
    assert "json/decoder.py" in names
    assert all(name.endswith(".py") for name in names)
    assert not any(set(name.split("/")[:-1]) & STDLIB_SKIPPED for name in names)
    argparse = next(document for document in found if document.name == "argparse.py").read()
    assert isinstance(argparse, str)
    assert "class ArgumentParser" in argparse


def test_package_gives_its_python_sources_without_being_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pile" / "deep").mkdir(parents=True)
    (tmp_path / "pile" / "tests").mkdir()
    (tmp_path / "pile" / "testing").mkdir()
    (tmp_path / "pile" / "__init__.py").write_text("raise RuntimeError")
    for name in ("deep/a.py", "tests/b.py", "testing/c.py", "d.txt"):
        (tmp_path / "pile" / name).write_text(name)
    monkeypatch.syspath_prepend(tmp_path)
    found = find_documents("package:pile").documents
    assert [document.name for document in found] == ["pile/__init__.py", "pile/deep/a.py"]
    assert found[1].read() == "deep/a.py"
    assert "pile" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchh", r"no package torchh is installed here \(did you mean package:torch\?\); install it, or give"),
        ("zzqqxxyy", "no package zzqqxxyy is installed here; install it"),
        ("torch.nn", r"package:torch\.nn: give a package's name as in `import NAME`, without dots"),
        ("", "give a package's name"),
        ("argparse", "package:argparse isn't one folder of Python sources; give another package"),
        ("sys", "isn't one folder of Python sources"),
        ("__main__", "no package __main__|isn't one folder"),
    ],
)  # fmt: skip
def test_packages_that_give_no_sources(name: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"^data\.train: .*({message})"):
        find_documents(f"package:{name}")


def test_folder_is_walked_sorted_relative_and_hidden_entries_are_noted(tmp_path: Path) -> None:
    _write(tmp_path, b_txt="b", a__c_txt="c", a__d_md="d")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("x")
    (tmp_path / ".hidden").write_text("x")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "x.pyc").write_bytes(b"\0")
    found = find_documents(str(tmp_path))
    assert [document.name for document in found.documents] == ["a/c.txt", "a/d.md", "b.txt"]
    assert [document.read() for document in found.documents] == ["c", "d", "b"]
    assert found.notes == (f"{tmp_path}: 2 hidden files and folders not read",)


def test_file_and_glob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, b_txt="b", a__c_txt="c", a__d_md="d")
    assert _names(tmp_path / "b.txt") == ["b.txt"]
    assert _names(tmp_path / "**" / "*.txt") == ["a/c.txt", "b.txt"]
    assert _names(tmp_path / "a" / "*.md") == ["d.md"]
    monkeypatch.chdir(tmp_path)
    assert _names("*/*.txt") == ["a/c.txt"]


def test_names_do_not_depend_on_where_the_folder_lies(tmp_path: Path) -> None:
    for root in ("one", "two/deeper"):
        _write(tmp_path / root, a__c_txt="c", b_txt="b")
    assert _names(tmp_path / "one") == _names(tmp_path / "two" / "deeper")


def test_a_file_whose_name_holds_glob_characters_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("x")
    assert _names(tmp_path / "a[1].txt") == ["a[1].txt"]


@pytest.mark.skipif(os.name != "posix", reason="file names are bytes on POSIX only")
def test_file_names_that_are_no_text_become_text(tmp_path: Path) -> None:
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("x")
    except OSError:
        pytest.skip("this file system refuses such names")
    assert _names(tmp_path) == ["caf\\udce9.txt"]


@pytest.mark.parametrize("source", ["nowhere", "nowhere/*.txt"])
def test_missing_paths(tmp_path: Path, source: str) -> None:
    with pytest.raises(UserError, match=r"data\.train: .*nowhere.* (does not exist|matches no file)"):
        find_documents(str(tmp_path / source))


def test_missing_path_suggests_its_neighbour_and_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    with pytest.raises(UserError, match=r"^data\.heldout: .*corpsu does not exist \(did you mean .*/corpus\?\)"):
        find_documents(str(tmp_path / "corpsu"), "data.heldout")


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no files"):
        find_documents(str(tmp_path))


def test_glob_of_folders_only_matches_no_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    with pytest.raises(UserError, match="matches no file"):
        find_documents(str(tmp_path / "*"))


@pytest.mark.parametrize(
    ("raw", "what"),
    [(b"ab\0cd", r"binary file \(a zero byte at offset 2\)"), (b"caf\xe9 x", r"not UTF-8 text \(byte 3\)")],
)
def test_undecodable_file_is_named_with_the_way_out(tmp_path: Path, raw: bytes, what: str) -> None:
    (tmp_path / "image.png").write_bytes(raw)
    (document,) = find_documents(str(tmp_path)).documents
    with pytest.raises(UserError, match=rf"image\.png: is (a )?{what}; .*leave it out with a glob such as"):
        document.read()


def test_file_that_vanished(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
    (document,) = find_documents(str(tmp_path)).documents
    with pytest.raises(UserError, match=r"a\.txt: can't be read \(No such file"):
        document.read()


def test_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert find_documents(str(tmp_path / "a.txt")).documents[0].read() == "hello"


def test_jsonl_of_each_kind(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    _jsonl(tmp_path / "a.jsonl", {"text": "one"}, "", {"text": "line\u2028separator"})
    _jsonl(
        tmp_path / "b.jsonl", {"prompt": "p", "completion": "c", "id": 7}, {"completion": "d", "prompt": "", "id": 8}
    )
    _jsonl(tmp_path / "c.jsonl", {"messages": messages})
    found = find_documents(str(tmp_path))
    assert [(document.name, document.read()) for document in found.documents] == [
        ("a.jsonl:1", "one"),
        ("a.jsonl:3", "line\u2028separator"),
        ("b.jsonl:1", Pair("p", "c")),
        ("b.jsonl:2", Pair("", "d")),
        ("c.jsonl:1", Conversation(tuple(messages))),
    ]
    assert found.documents[1].where == f"{tmp_path}/a.jsonl:3"
    assert found.notes == ("b.jsonl: key 'id' ignored on 2 lines",)


def test_jsonl_line_separators_inside_strings_do_not_split_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"text": "a\u2028b\x85c"}\r\n{"text": "d"}\n'.encode())
    assert [document.read() for document in find_documents(str(tmp_path / "a.jsonl")).documents] == [
        "a\u2028b\x85c",
        "d",
    ]


_USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "b"', r"not valid JSON \(Expecting .* at column 13\); a \.jsonl file holds one"),
        ("[1]", "expected a JSON object with text, prompt .* found a list"),
        ("3", "found a number"),
        ({}, "an empty object; accepted keys are text, prompt \\+ completion, or messages"),
        ({"txt": "b"}, r"no accepted key among 'txt' \(did you mean 'text' instead of 'txt'\?\); accepted keys are"),
        ({"Text": "b"}, r"did you mean 'text' instead of 'Text'"),
        ({"prompt": "b"}, "'prompt' without 'completion'; accepted keys are"),
        ({"prompt": "b", "completon": "c"}, r"without 'completion' \(did you mean 'completion' instead of 'completon'"),
        ({"completion": "b"}, "'completion' without 'prompt'"),
        ({"text": "b", "messages": []}, "has 'messages' \\+ 'text', which is ambiguous"),
        ({"text": "b", "prompt": "c"}, "ambiguous"),
        ({"text": 3}, "text must be a string, found a number"),
        ({"text": None}, "text must be a string, found null"),
        ({"text": " \n"}, "text is empty; remove the line"),
        ('{"text": "\\ud800"}', "text holds half of a surrogate pair"),
        ({"prompt": ["b"], "completion": "c"}, "prompt must be a string, found a list"),
        ({"prompt": "b", "completion": ""}, "completion is empty"),
        ({"messages": "hello"}, "messages must be a non-empty list .* found a string"),
        ({"messages": []}, "found an empty list"),
        ({"messages": ["hello"]}, "message 1 must be an object with role and content, found a string"),
        ({"messages": [_USER, {"role": "assistant", "contents": "a"}]}, "message 2 has no content .*of 'contents'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "message 1: content must be a string"),
        ({"messages": [_USER]}, r"no message has role assistant \(roles: user\), so every label would be masked"),
    ],
)  # fmt: skip
def test_jsonl_mistakes_name_file_line_and_remedy(tmp_path: Path, line: object, message: str) -> None:
    path = _jsonl(tmp_path / "bad.jsonl", "", line)
    with pytest.raises(UserError, match=rf"bad\.jsonl:2: .*{message}"):
        find_documents(str(path))


def test_deeply_nested_json_is_a_mistake_in_the_data(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "bad.jsonl", "[" * 200_000)
    with pytest.raises(UserError, match=r"bad\.jsonl:1: not valid JSON"):
        find_documents(str(path))


def test_jsonl_lines_with_different_keys(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "mixed.jsonl", {"text": "a"}, {"text": "b"}, {"prompt": "a", "completion": "b"})
    with pytest.raises(
        UserError, match=r"mixed\.jsonl:3: has 'prompt' \+ 'completion' but line 1 has 'text'; .*separate"
    ):
        find_documents(str(path))


def test_jsonl_without_lines(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"empty\.jsonl: holds no lines"):
        find_documents(str(_jsonl(tmp_path / "empty.jsonl", "", " ")))


def test_digest_tells_contents_apart() -> None:
    pair = Pair("a", "b")
    contents = ["a", "ab", pair, Pair("ab", ""), Conversation((_USER,))]
    assert len({digest(content) for content in contents}) == len(contents)
    assert digest(pair) == digest(Pair("a", "b"))
