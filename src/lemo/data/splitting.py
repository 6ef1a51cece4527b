"""Which documents are held out: by a hash of the name, the same on every machine and in every run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from lemo.data.documents import Document
from lemo.data.labelling import Encoded
from lemo.errors import UserError


def name_hash(name: str, salt: str = "") -> int:
    """64 bits of SHA-256; Python's own `hash` differs from run to run."""
    return int.from_bytes(hashlib.sha256(f"{salt}{name}".encode()).digest()[:8], "big")


def is_heldout(name: str, share: float) -> bool:
    """Whether the hash sends the document of this name to held-out, which happens to `share` of all names."""
    return name_hash(name) < share * 2**64


def split_by_name(documents: Sequence[Document], share: float) -> tuple[list[Document], list[Document]]:
    """(train, held-out).

    Raises:
        UserError: either of them is empty.
    """
    heldout = [document for document in documents if is_heldout(document.name, share)]
    train = [document for document in documents if not is_heldout(document.name, share)]
    for part, other, change in (("held-out", heldout, "raise"), ("training", train, "lower")):
        if not other:
            raise UserError(
                f"splitting {len(documents)} document(s) by name left no {part} document; "
                f"{change} data.heldout_share (now {share:g}), give more documents, or give data.heldout"
            )
    return train, heldout


def shuffled(documents: Iterable[Document], seed: int | str) -> list[Document]:
    """In an order that depends on the names and the seed only, so that a share of it is a fair sample."""
    return sorted(documents, key=lambda document: (name_hash(document.name, f"{seed}:"), document.name))


def refuse_shared_text(train: Iterable[Encoded], heldout: Iterable[Encoded], *, split: bool) -> None:
    """Training on a held-out text would make its loss meaningless.

    Raises:
        UserError: a document of `train` has the same text as one of `heldout`.
    """
    known = {document.digest: document.where for document in train}
    for document in heldout:
        if (twin := known.get(document.digest)) is not None:
            remedy = "remove one of the two" if split else "take it out of data.train or data.heldout"
            raise UserError(f"{document.where}: held out, but {twin}, used for training, has the same text; {remedy}")
