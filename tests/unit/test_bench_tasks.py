"""The quality lab's tasks: exact lengths, labels where they belong, and nothing of the held-out text in training."""

from __future__ import annotations

import json
import random
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import lemo.bench.tasks.text as text_module
from lemo.bench.config import TaskConfig
from lemo.bench.tasks import Task, build_task
from lemo.bench.tasks.retrieval import ADJECTIVES, NOUNS
from lemo.data.labelling import Encoder
from lemo.data.splitting import is_heldout
from lemo.errors import UserError
from tiny_tokenizer import byte_tokenizer

BYTES = byte_tokenizer()
# Line breaks that begin a token ("\n  "), that end one (":\n"), and that are one.
MERGED = byte_tokenizer(merges=[("Ċ", "Ġ"), ("ĊĠ", "Ġ"), (":", "Ċ"), ("e", "Ġ")])
SHARE = 0.3
FACT = re.compile(r"^# The access code of the (\w+ \w+) is (\d{4})\.$", re.MULTILINE)


def _lines(name: str, count: int) -> str:
    return "".join(f"def {name}_{i}():\n  return {name} + {i}\n" for i in range(count))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 files in 4 folders, 500 to 2,500 bytes, no two alike."""
    root = tmp_path_factory.mktemp("corpus")
    generator = random.Random(0)
    for index in range(48):
        path = root / "abcd"[index % 4] / f"{index:02}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(_lines(f"f{index}", generator.randint(14, 60)))
    return root


def _build(corpus: Path, kind: str, tokenizer: Any = BYTES, **settings: Any) -> Task:
    values: dict[str, Any] = {"sources": (str(corpus),), "heldout_share": SHARE}
    values |= {
        "sft": {"max_tokens": 400, "min_tokens": 100, "completion_tokens": (20, 80)},
        "lm": {"max_tokens": 1000},
        "extension": {"max_tokens": 1000},
        "retrieval": {
            "max_tokens": 900,
            "lengths": (600, 900),
            "keys": 5,
            "questions": 3,
            "train_sequences": 20,
            "heldout_sequences": 4,
        },
    }[kind]
    return build_task(TaskConfig(kind=kind, **(values | settings)), tokenizer)


def _text(ids: list[int], tokenizer: Any = BYTES) -> str:
    return tokenizer.decode(ids)


def _file(name: str) -> str:
    return name.rpartition("#")[0]


# ---- sft ----


def test_sft_rows_are_stretches_of_files_with_the_completion_labelled(corpus: Path) -> None:
    task = _build(corpus, "sft")
    completions, prompts = [], []
    for part in (task.train, task.heldout):
        for row in part:
            ids, labels = row["input_ids"], row["labels"]
            prompt = labels.count(-100)
            assert labels == [-100] * prompt + ids[prompt:]
            assert len(ids) <= 400
            assert prompt >= 100
            assert 20 <= len(ids) - prompt <= 80
            assert _text(ids) in (corpus / _file(row["name"])).read_text()
            completions.append(len(ids) - prompt)
            prompts.append(prompt)
    assert len(set(completions)) > 30
    assert len(set(prompts)) > 60
    # Log-uniform between 20 and 80: half of them under 40. Were they uniform, it would be a third.
    assert 0.42 < sum(length <= 40 for length in completions) / len(completions) < 0.58


def test_sft_stretches_of_a_file_follow_each_other_and_end_with_it(corpus: Path) -> None:
    task = _build(corpus, "sft", train_sequences=10_000)
    files: dict[str, dict[int, str]] = {}
    for row in task.train:
        name, number = row["name"].rsplit("#", 1)
        files.setdefault(name, {})[int(number)] = _text(row["input_ids"])
    assert sum(len(windows) > 1 for windows in files.values()) > 5
    for name, windows in files.items():
        whole = (corpus / name).read_text()
        assert sorted(windows) == list(range(1, len(windows) + 1))
        joined = "".join(windows[number] for number in sorted(windows))
        assert whole.startswith(joined)
        assert len(whole) - len(joined) < 100 + 20, "what is left over is too short for another"


def test_sft_takes_one_stretch_of_each_file_before_a_second(corpus: Path) -> None:
    few = _build(corpus, "sft", heldout_sequences=8)
    assert len({_file(name) for name in few.heldout["name"]}) == 8
    assert any(not name.endswith("#1") for name in few.heldout["name"]), "not only files' beginnings"
    many = _build(corpus, "sft", heldout_sequences=10_000)
    names = many.heldout["name"]
    assert len(set(names)) == len(names) > len({_file(name) for name in names})
    assert names != sorted(names)


# ---- lm and extension ----


@pytest.mark.parametrize("kind", ["lm", "extension"])
def test_lm_rows_are_the_joined_files_cut_to_length(corpus: Path, kind: str) -> None:
    task = _build(corpus, kind, train_sequences=10_000, heldout_sequences=10_000)
    files: list[set[str]] = []
    for part, rows in (("train", task.train), ("heldout", task.heldout)):
        pieces = {}
        for row in rows:
            assert len(row["input_ids"]) == 1000
            assert row["labels"] == [-100, *row["input_ids"][1:]]
            pieces[int(row["name"].rpartition("#")[2])] = _text(row["input_ids"])
        whole = "".join(pieces[number] for number in sorted(pieces))
        names = re.findall(r"^# file: (.*)$", whole, re.MULTILINE)
        assert len(set(names)) == len(names), "a file's text appears once"
        rebuilt = "".join(f"# file: {name}\n{(corpus / name).read_text()}" for name in names)
        assert rebuilt.startswith(whole)
        folders = [name.partition("/")[0] for name in names]
        assert sum(a != b for a, b in pairwise(folders)) == len(set(folders)) - 1
        for folder in set(folders):
            own = [name for name in names if name.startswith(f"{folder}/")]
            assert own == sorted(own)
        first = next(row for row in rows if row["name"].endswith("#2"))
        assert f"# file: {_file(first['name'])}\n" in whole[: 1000 + 1], "named by the file it begins in"
        account = task.facts["parts"][part]
        files.append(set(names))
        assert account["documents"] == len(names)
        assert account["dropped_tokens"] < 1000
    assert not files[0] & files[1]
    assert task.train["name"] != sorted(task.train["name"], key=lambda name: int(name.rpartition("#")[2]))


def test_a_cap_reads_no_more_text_than_it_needs(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "_BATCH_DOCUMENTS", 1)
    tokenized: list[str] = []
    encode = Encoder._encode_batch

    def note(self: Any, documents: Any, contents: Any) -> Any:
        tokenized.extend(document.name for document in documents)
        return encode(self, documents, contents)

    monkeypatch.setattr(Encoder, "_encode_batch", note)
    for kind in ("lm", "sft"):
        tokenized.clear()
        task = _build(corpus, kind, train_sequences=2, heldout_sequences=1)
        assert len(tokenized) == len(set(tokenized)) <= 6
        assert (len(task.train), len(task.heldout)) == (2, 1)


# ---- retrieval ----


@pytest.mark.parametrize("tokenizer", [BYTES, MERGED], ids=["bytes", "merged"])
def test_retrieval_rows_hold_their_facts_and_answers(corpus: Path, tokenizer: Any) -> None:
    task = _build(corpus, "retrieval", tokenizer)
    everything = "".join(f"# file: {path.relative_to(corpus)}\n{path.read_text()}" for path in corpus.rglob("*.py"))
    every_line = set(everything.splitlines())
    depths = []
    for row in task.heldout:
        ids, labels = row["input_ids"], row["labels"]
        assert len(ids) == row["length"]
        spans = list(zip(row["answer_start"], row["answer_end"], strict=True))
        inside = {position for start, end in spans for position in range(start, end)}
        assert labels == [token if position in inside else -100 for position, token in enumerate(ids)]
        whole = _text(ids, tokenizer)
        text = whole[: whole.index("\nQuestion:")]
        facts = FACT.findall(text)
        assert len(facts) == len({key for key, _ in facts}) == len({value for _, value in facts}) == 5
        asked = re.findall(r"\nQuestion: What is the access code of the (\w+ \w+)\?\nAnswer: (\d{4})", whole)
        assert len({key for key, _ in asked}) == 3
        assert set(asked) <= set(facts)
        question = f"\nQuestion: What is the access code of the {asked[0][0]}?\nAnswer:"
        document_tokens = spans[0][0] - len(tokenizer(question)["input_ids"])
        for (key, value), (start, end), depth in zip(asked, spans, row["depth"], strict=True):
            assert _text(ids[start:end], tokenizer) == f" {value}"
            place = len(_text(ids[: round(depth * document_tokens)], tokenizer))
            assert text[place:].lstrip("\n").startswith(f"# The access code of the {key} is {value}.\n")
            depths.append(depth)
        kept = FACT.sub("", text).split("\n")
        # The row's first and last line are cut wherever its text begins and ends.
        assert set(kept[1:-1]) <= every_line | {""}
        assert len(text) - sum(len(f"# The access code of the {key} is {value}.\n") for key, value in facts) >= 150
    assert all(0 <= depth < 1 for depth in depths)
    assert min(depths) < 0.25
    assert max(depths) > 0.75


def test_retrieval_lengths_are_drawn_in_training_and_taken_in_turn_for_judging(corpus: Path) -> None:
    task = _build(corpus, "retrieval")
    assert task.heldout["length"] == [600, 900] * 4
    assert len(task.train) == 20
    assert {len(ids) for ids in task.train["input_ids"]} == {600, 900}
    assert set(task.train.column_names) == {"input_ids", "labels", "name"}


def test_retrieval_draws_other_facts_for_every_row_and_part(corpus: Path) -> None:
    task = _build(corpus, "retrieval")
    planted = [tuple(FACT.findall(_text(row["input_ids"]))) for part in (task.train, task.heldout) for row in part]
    assert all(len(facts) == 5 for facts in planted)
    assert len(set(planted)) == len(planted) == 28


def test_retrieval_goes_through_short_text_again(corpus: Path) -> None:
    task = _build(corpus, "retrieval", train_sequences=300)
    assert task.facts["parts"]["train"]["passes"] > 1
    assert len(task.train) == 300
    assert len({tuple(ids) for ids in task.train["input_ids"]}) == 300


def test_words_of_keys_are_many_and_different() -> None:
    for words in (ADJECTIVES, NOUNS):
        assert len(set(words)) == len(words) >= 32


# ---- Every kind ----


@pytest.mark.parametrize("kind", ["sft", "lm", "retrieval"])
def test_no_document_and_no_text_is_in_both_parts(corpus: Path, tmp_path: Path, kind: str) -> None:
    heldout = [path for path in sorted(corpus.rglob("*.py")) if is_heldout(f"{path.relative_to(corpus)}", SHARE)]
    for path in corpus.rglob("*.py"):
        copy = tmp_path / path.relative_to(corpus)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(path.read_text())
    twins = [f"a/twin{i}.py" for i in range(20) if not is_heldout(f"a/twin{i}.py", SHARE)]
    for name, path in zip(twins, heldout, strict=False):
        (tmp_path / name).write_text(path.read_text())
    task = _build(tmp_path, kind, train_sequences=200, heldout_sequences=200)
    account = task.facts["parts"]["train"]
    assert account["copies"] == min(len(twins), len(heldout))
    functions = []
    for rows in (task.train, task.heldout):
        functions.append({name for row in rows for name in re.findall(r"def (f\d+)_\d", _text(row["input_ids"]))})
    assert functions[0]
    assert functions[1]
    assert not functions[0] & functions[1]


@pytest.mark.parametrize("kind", ["sft", "lm", "retrieval"])
def test_the_same_text_gives_the_same_task(corpus: Path, kind: str) -> None:
    first, second = _build(corpus, kind), _build(corpus, kind)
    assert first.train.to_dict() == second.train.to_dict()
    assert first.heldout.to_dict() == second.heldout.to_dict()
    assert first.facts == second.facts
    rows = [tuple(ids) for part in (first.train, first.heldout) for ids in part["input_ids"]]
    assert len(set(rows)) == len(rows), "no row twice"


@pytest.mark.parametrize("kind", ["sft", "lm", "retrieval"])
def test_facts_count_what_is_there(corpus: Path, kind: str) -> None:
    task = _build(corpus, kind)
    facts = json.loads(json.dumps(task.facts))
    assert facts["kind"] == kind
    assert sum(part["documents_found"] for part in facts["parts"].values()) == 48
    for name, rows in (("train", task.train), ("heldout", task.heldout)):
        account, lengths = facts["parts"][name], sorted(len(ids) for ids in rows["input_ids"])
        assert account["sequences"] == len(rows)
        assert account["tokens"] == sum(lengths)
        assert account["labelled_tokens"] == sum(label != -100 for row in rows["labels"] for label in row)
        assert (account["length_min"], account["length_max"]) == (lengths[0], lengths[-1])
        assert account["length_median"] in lengths
        assert 0 < account["documents"] <= account["documents_found"]


def test_several_sources_keep_their_documents_apart(corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for index in range(8):
        path = other / "a" / f"{index:02}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_lines(f"g{index}", 40))
    task = _build(corpus, "lm", sources=(str(corpus), str(other), "package:lemo"), train_sequences=10_000)
    tops = {name.partition("/")[0] for name in task.train["name"]}
    assert tops == {corpus.name, "other", "lemo"}
    assert any(name.startswith("lemo/") for name in task.heldout["name"])


def test_bos_comes_where_the_encoder_puts_it(corpus: Path) -> None:
    tokenizer = byte_tokenizer(bos=True)
    task = _build(corpus, "retrieval", tokenizer)
    bos = tokenizer.bos_token_id
    for row in task.heldout:
        assert len(row["input_ids"]) == row["length"]
        first = row["answer_start"][0]
        assert bos not in row["input_ids"][first - 60 :], "questions and answers are no new texts"
        text = tokenizer.decode(row["input_ids"])
        assert text.count("<s>") == len(re.findall(r"<s>\n?# file: |<s>$", text))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("sft", {"min_tokens": 9000, "max_tokens": 9999}, r"none of the \d+ training .*task\.min_tokens .*lower them"),
        ("lm", {"max_tokens": 100_000}, r"the training text has .* lower task\.max_tokens, or lower task\.heldout_sh"),
        ("lm", {"max_tokens": 30_000}, r"the held-out text has .* or raise task\.heldout_share .*task\.sources"),
        ("lm", {"heldout_share": 1e-6}, r"leaves no held-out document; raise task\.heldout_share"),
        ("lm", {"heldout_share": 1 - 1e-6}, r"leaves no training document; lower task\.heldout_share"),
        ("retrieval", {"keys": 20}, r"task\.keys 20 and task\.questions 3 leave \d+ tokens .*raise task\.lengths"),
        ("retrieval", {"questions": 5, "lengths": (300, 900)}, r"leave 0 tokens of text in a sequence of 300"),
        ("retrieval", {"keys": 1025}, r"task\.keys is 1,025, and there are 1,024 names"),
        ("retrieval", {"max_tokens": 50_000, "lengths": (50_000,)}, r"training text has .* lower task\.lengths"),
        ("lm", {"sources": ("package:nowhere_to_be_found",)}, r"task\.sources: no package nowhere_to_be_found"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_said_with_the_setting_to_change(
    corpus: Path, kind: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        _build(corpus, kind, **settings)


def test_sources_whose_names_collide(corpus: Path, tmp_path: Path) -> None:
    twin = tmp_path / corpus.name
    (twin / "a").mkdir(parents=True)
    (twin / "a" / "00.py").write_text("x")
    with pytest.raises(UserError, match=rf"would both be named '{corpus.name}/a/00\.py'; .*different names"):
        _build(corpus, "lm", sources=(str(corpus), str(twin)))


def test_prompts_and_messages_are_no_text(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"p{index}", "completion": "c"}) for index in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"a\.jsonl:\d+: task\.sources takes plain text, not prompts"):
        _build(tmp_path, "lm")


def test_blank_files_are_no_text(tmp_path: Path) -> None:
    for index in range(20):
        (tmp_path / f"{index}.txt").write_text(" \n" * index)
    with pytest.raises(UserError, match=r"the training documents of task\.sources hold no text .*add text"):
        _build(tmp_path, "lm")


def test_text_without_lines_has_no_place_for_facts(tmp_path: Path) -> None:
    for index in range(10):
        (tmp_path / f"{index}.txt").write_text(f"{index}" * 60_000)
    # Headings are the only lines.
    with pytest.raises(UserError, match=r"facts are planted between lines, and .* have no line break; give task"):
        _build(tmp_path, "retrieval", lengths=(600,), max_tokens=600, train_sequences=200)
