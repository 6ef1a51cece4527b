"""`mode: auto`: what to leave out, by the data. The rules are the quality lab's and the step benchmark's findings
(docs/quality.md): nothing is chosen that costs more than 2 points of ordinary LoRA's gain where it was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lemo.config import SparsityConfig

# Prompt and completion: 8% of all tokens in task `sft`, under 1% in `retrieval`. Where half of the tokens or more have
# labels the kept ones leave little to save.
MOST_LABELLED = 0.5
# Tokens. From here on attention is most of a step, and `attend` worth a hint. It isn't chosen: with few labels it
# retains 98% of the gain in `sft` and all of it in `retrieval`, but longer prompts than 16K weren't measured.
LONG = 32768


@dataclass(frozen=True)
class Choice:
    """What `mode: auto` came to.

    Attributes:
        sparsity: a configuration with another mode.
        reason: one sentence for the user.
    """

    sparsity: SparsityConfig
    reason: str


def choose_sparsity(sparsity: SparsityConfig, lengths: Sequence[int], labelled_tokens: int) -> Choice:
    """The configuration for a training set.

    Args:
        sparsity: `mode: auto`, with `tile_mib` perhaps.
        lengths: tokens of each sequence.
        labelled_tokens: of all of them.
    """
    labelled, typical = labelled_tokens / sum(lengths), _typical(lengths)
    found = f"{labelled:.0%} of the tokens have labels, and half of them lie in sequences of {typical:,} tokens or more"
    mode: Literal["dense", "backward"] = "dense" if labelled > MOST_LABELLED else "backward"
    reason = f"mode {mode}: {found}"
    if mode == "dense":
        reason += (
            "; with labels nearly everywhere nothing can be left out unseen (1 to 2 points of the gain for time on "
            "long sequences: sparsity={mode: dense, attend: {density: 0.25, choice: sampled}}, docs/quality.md)"
        )
    elif typical >= LONG:
        reason += "; faster still at this length: sparsity={attend: {density: 0.25, labelled: dense}} (docs/quality.md)"
    return Choice(SparsityConfig(mode=mode, tile_mib=sparsity.tile_mib), reason)


def _typical(lengths: Sequence[int]) -> int:
    """Half of all tokens lie in sequences at least as long."""
    ascending = np.sort(np.asarray(lengths))
    return int(ascending[np.searchsorted(ascending.cumsum(), ascending.sum() / 2)])
