"""Texts to calibrate SmolLM2 with: `python -m benchmarks.calibration.texts DIRECTORY`.

`train.jsonl`: the part of Python's library that the split by name trains on, and the sources of torch;
`heldout.jsonl`: the held-out part of the library. More text than the library's is what attention's predictors lack.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from lemo.config import DataConfig
from lemo.data.documents import Document, find_documents
from lemo.data.splitting import split_by_name


def write(documents: Iterable[Document], path: Path, known: set[str]) -> int:
    """Writes their texts, those that are known aside; returns how many."""
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            text = document.read()
            assert isinstance(text, str), "sources are plain text"
            if text.strip() and text not in known:
                known.add(text)
                file.write(json.dumps({"text": text}) + "\n")
                written += 1
    return written


def main(directory: Path) -> None:
    """Writes both files."""
    directory.mkdir(parents=True, exist_ok=True)
    train, heldout = split_by_name(find_documents("stdlib").documents, DataConfig().heldout_share)
    known: set[str] = set()
    print("held out", write(heldout, directory / "heldout.jsonl", known))
    print("training", write([*train, *find_documents("package:torch").documents], directory / "train.jsonl", known))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
