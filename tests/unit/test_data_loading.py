"""`lemo.data.load`: from a configuration to two datasets and a report that adds up."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import lemo.data
from lemo.config import DataConfig
from lemo.data.account import SplitAccount
from lemo.data.documents import Document
from lemo.data.splitting import is_heldout, name_hash, shuffled, split_by_name
from lemo.errors import UserError
from tiny_tokenizer import CHATML, byte_tokenizer

TOKENIZER = byte_tokenizer()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 files of 10 to 49 tokens, all different."""
    root = tmp_path / "corpus"
    root.mkdir()
    for index in range(40):
        (root / f"{index:02}.txt").write_text(f"{index:02}" + "x" * (8 + index))
    return root


def _load(source: Path | str, seed: int = 0, **settings: Any) -> lemo.data.Loaded:
    return lemo.data.load(DataConfig(train=str(source), **settings), TOKENIZER, seed)


def _balances(account: SplitAccount) -> bool:
    dropped = account.short.tokens + account.long.tokens
    documents = account.documents + account.empty + account.short.documents + account.long.documents
    return (
        account.tokens_read == account.tokens + account.truncated.tokens + dropped
        and account.found == documents + account.not_taken
    )


def test_split_is_disjoint_complete_and_by_hash_of_the_name(folder: Path) -> None:
    loaded = _load(folder, heldout_share=0.3)
    train, heldout = set(loaded.train["name"]), set(loaded.heldout["name"])
    assert not train & heldout
    assert train | heldout == {f"{index:02}.txt" for index in range(40)}
    assert heldout == {name for name in train | heldout if is_heldout(name, 0.3)}


def test_hash_is_the_same_on_every_machine() -> None:
    # First 16 hex digits of `printf NAME | sha256sum`.
    assert name_hash("argparse.py") == 0xC93FA5724C1B9BF2
    assert name_hash("json/decoder.py") == 0x3B2E3CB3D29D57A5
    assert name_hash("café.txt") == 0x5996D1F7905C244C
    share = 0xC93FA5724C1B9BF2 / 2**64
    assert is_heldout("argparse.py", share + 1e-6)
    assert not is_heldout("argparse.py", share - 1e-6)


def test_a_larger_share_holds_out_a_superset_near_the_share() -> None:
    names = [f"file{index}.py" for index in range(4000)]
    small, large = ({name for name in names if is_heldout(name, share)} for share in (0.1, 0.3))
    assert small < large
    assert abs(len(small) / 4000 - 0.1) < 0.02
    assert abs(len(large) / 4000 - 0.3) < 0.03


def test_order_depends_on_seed_only_and_heldout_not_even_on_it(folder: Path) -> None:
    one, again, other = (_load(folder, seed=seed, heldout_share=0.3) for seed in (0, 0, 1))
    assert one.train["name"][:] == again.train["name"][:]
    assert one.train["name"][:] != other.train["name"][:]
    assert sorted(one.train["name"]) == sorted(other.train["name"])
    assert one.heldout["name"][:] == other.heldout["name"][:]


def test_columns_and_types(folder: Path) -> None:
    loaded = _load(folder, completion_tokens=4)
    assert loaded.train.column_names == ["input_ids", "labels", "name"]
    row = loaded.train[0]
    text = (folder / row["name"]).read_text()
    assert TOKENIZER.decode(row["input_ids"]) == text
    assert row["labels"] == [-100] * (len(text) - 4) + row["input_ids"][-4:]


def test_packing_restarts_positions_and_stays_within_the_limit(folder: Path) -> None:
    plain, packed = _load(folder, max_tokens=100), _load(folder, max_tokens=100, packing=True)
    assert packed.train.column_names == ["input_ids", "labels", "position_ids", "name"]
    assert packed.heldout.column_names == ["input_ids", "labels", "name"]
    documents = {}
    for row in packed.train:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["position_ids"]) <= 100
        starts = [index for index, position in enumerate(row["position_ids"]) if position == 0]
        names = row["name"].split(" + ")
        assert len(starts) == len(names)
        for name, start, end in zip(names, starts, [*starts[1:], len(row["input_ids"])], strict=True):
            assert row["position_ids"][start:end] == list(range(end - start))
            assert row["labels"][start] == -100
            documents[name] = (row["input_ids"][start:end], row["labels"][start:end])
    assert documents == {row["name"]: (row["input_ids"], row["labels"]) for row in plain.train}
    assert packed.report.train.packed_rows == len(packed.train) < packed.report.train.sequences


@pytest.mark.parametrize("overflow", ["truncate", "split", "drop"])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("max_documents", [None, 5])
def test_books_agree_with_the_datasets_and_the_files(
    folder: Path, overflow: str, packing: bool, max_documents: int | None
) -> None:
    (folder / "empty.txt").write_text(" \n")
    loaded = _load(
        folder, max_tokens=30, min_tokens=14, overflow=overflow, packing=packing, max_documents=max_documents
    )
    report = loaded.report
    for account, dataset in ((report.train, loaded.train), (report.heldout, loaded.heldout)):
        assert _balances(account)
        assert account.rows == len(dataset)
        assert account.tokens == sum(map(len, dataset["input_ids"]))
        assert account.labelled_tokens == sum(label != -100 for row in dataset["labels"] for label in row)
    assert report.train.found + report.heldout.found == 41
    if max_documents is None:
        assert report.train.not_taken == 0
        read = report.train.tokens_read + report.heldout.tokens_read
        assert read == sum(path.stat().st_size for path in folder.iterdir()) - 2
    else:
        assert report.train.documents == 5
        assert report.train.not_taken > 0


def test_max_documents_takes_a_prefix_of_the_seeded_order(folder: Path) -> None:
    everything = _load(folder, seed=3, min_tokens=20).train["name"][:]
    some = _load(folder, seed=3, min_tokens=20, max_documents=7)
    assert some.train["name"][:] == everything[:7]
    assert (
        f"train: {some.report.train.not_taken} documents past max_documents aren't counted in tokens"
        in some.report.notes
    )


def test_max_documents_beyond_what_there_is(folder: Path) -> None:
    assert _load(folder, max_documents=1000).report.train.not_taken == 0


def test_max_documents_leaves_the_rest_unread(folder: Path) -> None:
    order = [row["name"] for row in _load(folder).train]
    (folder / order[-1]).write_bytes(b"\0binary")
    assert len(_load(folder, max_documents=2).train) == 2
    with pytest.raises(UserError, match="binary file"):
        _load(folder)


def test_explicit_heldout(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("something else")
    loaded = _load(folder, heldout=str(tmp_path / "other.txt"))
    assert len(loaded.train) == 40
    assert loaded.heldout["name"][:] == ["other.txt"]
    with pytest.raises(UserError, match=r"^data\.heldout: .*nowhere does not exist"):
        _load(folder, heldout=str(tmp_path / "nowhere"))


def test_the_same_text_in_both_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.txt").write_text((folder / "07.txt").read_text())
    with pytest.raises(UserError, match=r"copy\.txt: held out, but .*07\.txt, used for training, has the same text"):
        _load(folder, heldout=str(tmp_path / "copy.txt"))
    names = [f"{index:02}.txt" for index in range(40)]
    heldout = next(name for name in names if is_heldout(name, 0.3))
    train = next(name for name in names if not is_heldout(name, 0.3))
    (folder / heldout).write_text((folder / train).read_text())
    with pytest.raises(UserError, match=rf"{heldout}: held out, but .*{train}.*remove one of the two"):
        _load(folder, heldout_share=0.3)


def test_the_same_text_is_no_matter_where_it_was_dropped(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "short.txt").write_text((folder / "00.txt").read_text())
    (tmp_path / "copy" / "long.txt").write_text("y" * 40)
    loaded = _load(folder, heldout=str(tmp_path / "copy"), min_tokens=12)
    assert loaded.heldout["name"][:] == ["long.txt"]


def test_heldout_alone_is_the_same_as_with_training(folder: Path) -> None:
    cfg = DataConfig(train=str(folder), max_tokens=30, overflow="truncate", packing=True)
    loaded = lemo.data.load(cfg, TOKENIZER, seed=5)
    dataset, account = lemo.data.load_heldout(cfg, TOKENIZER)
    assert dataset.to_dict() == loaded.heldout.to_dict()
    assert account == loaded.report.heldout


def test_one_document_cannot_be_split(folder: Path) -> None:
    with pytest.raises(UserError, match=r"splitting 1 document.* left no .* document; .*data\.heldout"):
        _load(folder / "00.txt")


def test_empty_parts_name_their_remedy() -> None:
    kept = [Document(name, name) for name in ("a", "b", "c", "d") if not is_heldout(name, 0.01)]
    with pytest.raises(UserError, match=r"left no held-out document; raise data\.heldout_share \(now 0\.01\)"):
        split_by_name(kept, 0.01)
    gone = [Document(name, name) for name in ("a", "b", "c", "d") if is_heldout(name, 0.99)]
    with pytest.raises(UserError, match=r"left no training document; lower data\.heldout_share \(now 0\.99\)"):
        split_by_name(gone, 0.99)


def test_everything_dropped_says_why_and_what_to_do(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no training document is left of \d+ \(\d+ under data\.min_tokens 60\)"):
        _load(folder, min_tokens=60)
    with pytest.raises(UserError, match=r"over data\.max_tokens 5 with overflow drop\); raise data\.max_tokens or set"):
        _load(folder, max_tokens=5, overflow="drop")
    (tmp_path / "heldout.txt").write_text("  ")
    with pytest.raises(UserError, match=r"no held-out document is left of 1 \(1 empty\); give another data\.heldout"):
        _load(folder, heldout=str(tmp_path / "heldout.txt"))


def test_a_long_document_is_an_error_unless_a_setting_says_otherwise(folder: Path) -> None:
    with pytest.raises(UserError, match=r"/\d\d\.txt: \d+ tokens, over data\.max_tokens 20; raise"):
        _load(folder, max_tokens=20)


def test_jsonl_lines_are_documents_and_ignored_keys_are_noted(tmp_path: Path) -> None:
    lines = [{"prompt": f"{index}+1=", "completion": str(index + 1), "id": index} for index in range(50)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, lines)))
    loaded = _load(tmp_path / "sums.jsonl")
    assert loaded.report.train.found + loaded.report.heldout.found == 50
    assert "sums.jsonl: key 'id' ignored on 50 lines" in loaded.report.notes
    for row in loaded.train:
        line = lines[int(row["name"].removeprefix("sums.jsonl:")) - 1]
        answer = [label for label in row["labels"] if label != -100]
        assert TOKENIZER.decode(answer) == f"{line['completion']}<|im_end|>"


def test_messages_end_to_end_and_mistakes_name_their_line(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}!"}]}
        for n in range(30)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    tokenizer = byte_tokenizer(template=CHATML)
    loaded = lemo.data.load(DataConfig(train=str(path)), tokenizer, 0)
    row = loaded.train[0]
    number = int(row["name"].removeprefix("chat.jsonl:")) - 1
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == f"{number}!<|im_end|>\n"
    lines[4]["messages"][1]["role"] = "asistant"
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match=r"chat\.jsonl:5: no message has role assistant \(roles: user, asistant\)"):
        lemo.data.load(DataConfig(train=str(path)), tokenizer, 0)


def test_report_says_what_numbers_alone_do_not(folder: Path) -> None:
    report = _load(folder, max_tokens=30, overflow="truncate", completion_tokens=12).report
    rows = {label.strip(): (train, heldout) for label, train, heldout in report.as_rows()}
    cut = report.train.truncated
    assert rows["truncated"][0] == f"{cut.documents} ({cut.tokens:,} cut)"
    assert rows["labelled tokens"] == (f"{report.train.labelled_tokens:,}", f"{report.heldout.labelled_tokens:,}")
    assert report.train.percentiles()["max"] == 30
    assert any("at most completion_tokens + 1 = 13 tokens are labelled whole" in note for note in report.notes)
    assert json.loads(json.dumps(report.as_dict()))["train"]["truncated"] == {
        "documents": cut.documents,
        "tokens": cut.tokens,
    }


def test_rendered_table_fits_a_terminal_and_holds_every_row_and_note(folder: Path) -> None:
    report = _load(folder, max_tokens=30, overflow="split", completion_tokens=12, packing=True, max_documents=9).report
    console = Console(file=StringIO(), width=80)
    console.print(report.render())
    output = console.file.getvalue()  # type: ignore[attr-defined]
    printed = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if "│" in line]
    assert printed == [[cell.strip() for cell in row] for row in report.as_rows()]
    assert " ".join(report.notes[-1].split()) in " ".join(output.split())


def test_shuffled_is_a_permutation_that_does_not_repeat_the_split() -> None:
    documents = [Document(str(index), "") for index in range(100)]
    order = shuffled(documents, 0)
    assert sorted(order, key=lambda d: int(d.name)) == documents
    # Ordering by the split's own hash would put all held-out documents first.
    flags = [is_heldout(document.name, 0.3) for document in order]
    assert flags != sorted(flags, reverse=True)


def test_the_standard_library_loads_under_the_default_job() -> None:
    cfg = DataConfig(completion_tokens=512, min_tokens=4096, overflow="truncate", max_documents=30)
    loaded = lemo.data.load(cfg, TOKENIZER, seed=0)
    assert len(loaded.train) == 30
    assert len(loaded.heldout) >= 8
    assert set(map(len, loaded.train["input_ids"])) == {4096}
    assert loaded.report.train.labelled_tokens == 30 * 512
    assert _balances(loaded.report.train)
    assert _balances(loaded.report.heldout)
