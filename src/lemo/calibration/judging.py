"""Judges a calibration on held-out sequences: scores, recall, and the loss with blocks left out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from lemo.calibration.allocation import threshold_of
from lemo.calibration.fitting import exact_scores, rotation_of
from lemo.config import BranchSelection
from lemo.errors import UserError
from lemo.evaluation import evaluate
from lemo.models import get_runtime, sparse_evaluation
from lemo.models.calibration import BRANCHES
from lemo.models.runtime import flag
from lemo.models.watching import BranchCall, watch
from lemo.selection.layout import build_layout
from lemo.selection.predictor import Predictor
from lemo.selection.score_errors import recall
from lemo.selection.score_heads import ScoreHeads
from lemo.selection.scores import attention_informativeness, block_means, from_predecessor
from lemo.training.storage import write_text
from lemo.types import Key


@dataclass(frozen=True)
class Scored:
    """What the dense model's branches are worth on the sample, by unit.

    Attributes:
        score: predicted, of all blocks of all sequences, on the CPU.
        edge: bool, first and last blocks.
        tokens: in each block.
        pairs: (predicted, exact) scores of each sequence's blocks.
        example: unit -> (predicted, exact) pair scores of the first sequence; of attention alone.
    """

    score: dict[Key, Tensor]
    edge: Tensor
    tokens: Tensor
    pairs: dict[Key, list[tuple[Tensor, Tensor]]]
    example: dict[Key, tuple[Tensor, Tensor]]

    def recall(self, keep: Mapping[Key, float]) -> dict[Key, float]:
        """Mean over the sequences of `lemo.selection.score_errors.recall` of these shares."""
        return {key: fmean(recall(*pair, keep[key]) for pair in pairs) for key, pairs in self.pairs.items()}


class Judge:
    """Losses of one model on one sample, each computed once: what was computed lies in a file and is read back.

    Args:
        model: sparsified with mode `forward`; its runtime holds the predictors and bypasses.
        rows: held-out sequences.
        collate: rows to tensors.
        block_size: tokens per block.
        score: as in `SparsityConfig`.
        device: where the model is.
        max_tokens: longest sequence.
        ledger: file of losses that have been computed.
    """

    def __init__(
        self,
        model: Any,
        rows: Dataset,
        collate: Callable[[list[Any]], dict[str, Tensor]],
        *,
        block_size: int,
        score: str,
        device: str,
        max_tokens: int,
        ledger: Path,
    ) -> None:
        self.model, self.rows, self.collate = model, rows, collate
        self.block_size, self.score, self.device, self.max_tokens = block_size, score, device, max_tokens
        self.causal = score == "causal"
        runtime = get_runtime(model)
        assert runtime is not None, "calibration sparsifies"
        self.runtime = runtime
        self._ledger = ledger
        self._known = _read_ledger(ledger)
        self._scored: Scored | None = None
        self.computed = 0

    @torch.no_grad()
    def scored(self) -> Scored:
        """Predicted scores and recall, from one pass of the dense model over the sample."""
        if self._scored is not None:
            return self._scored
        pairs: dict[Key, list[tuple[Tensor, Tensor]]] = {}
        example: dict[Key, tuple[Tensor, Tensor]] = {}
        edge, tokens = [], []

        def visit(call: BranchCall) -> None:
            key = (call.layer, call.branch)
            predictor = self.runtime.predictors.get(key)
            if predictor is None:
                return
            mass = self.score == "mass"
            exact = exact_scores(call, self.block_size, mass)
            if key not in example and isinstance(predictor, ScoreHeads):
                example[key] = (estimated_pairs(predictor, call, self.block_size, mass).cpu(), exact.cpu())
            predicted = estimates(predictor, call, self.block_size, causal=self.causal, mass=mass)
            wanted = block_scores(exact, self.block_size, self.causal)
            pairs.setdefault(key, []).append((predicted.cpu(), wanted.cpu()))

        with watch(self.model, visit):
            for row in self.rows:
                ids = torch.tensor(row["input_ids"], device=self.device)
                self.model.get_decoder()(input_ids=ids[None], use_cache=False)
                layout = build_layout(1, len(ids), self.block_size, torch.device("cpu"))
                edge.append(layout.edge_block)
                tokens.append(layout.block_tokens)
        self._scored = Scored(
            score={key: torch.cat([predicted for predicted, _ in found]) for key, found in pairs.items()},
            edge=torch.cat(edge),
            tokens=torch.cat(tokens),
            pairs=pairs,
            example=example,
        )
        return self._scored

    def thresholds(self, shares: Mapping[Key, float]) -> dict[Key, float]:
        """The thresholds that keep these shares on the sample, as the dense model scores it."""
        found = self.scored()
        return {key: threshold_of(found.score[key], found.edge, found.tokens, keep) for key, keep in shares.items()}

    def losses(self, shares: Mapping[Key, float]) -> list[float]:
        """Loss of each sequence with these shares kept, units without one dense; nats a labelled token."""
        return self.measure(self.thresholds(shares))[0]

    def measure(self, thresholds: Mapping[Key, float]) -> tuple[list[float], dict[Key, float]]:
        """(loss of each sequence, share of tokens each unit kept) with these thresholds."""
        name = json.dumps(sorted([*key, value] for key, value in thresholds.items() if value > 0))
        if name not in self._known:
            selection: dict[str, Any] = {
                branch: BranchSelection(
                    threshold=tuple(thresholds.get((layer, branch), 0.0) for layer in range(self.runtime.layers))
                )
                for branch in BRANCHES
            }
            config = self.runtime.config.model_copy(update=selection)
            self.runtime.collect()
            with flag(self.runtime, "config", config), sparse_evaluation(self.model):
                result = evaluate(
                    self.model,
                    self.rows,
                    self.collate,
                    documents=len(self.rows),
                    buckets=1,
                    device=self.device,
                    max_tokens=self.max_tokens,
                )
            kept = self.runtime.collect().keep
            losses = [document.loss for document in result.documents if document.loss is not None]
            self._known[name] = (losses, [list(pair) for pair in kept])
            self.computed += 1
            _append(self._ledger, {"thresholds": name, "losses": losses, "keep": kept})
        losses, kept_by_layer = self._known[name]
        return losses, {key: kept_by_layer[key[0]][BRANCHES.index(key[1])] for key in self.scored().score}


def estimates(predictor: Predictor, call: BranchCall, block_size: int, *, causal: bool, mass: bool) -> Tensor:
    """A predictor's block scores of one document [n], as mode `forward` computes them."""
    if isinstance(predictor, ScoreHeads):
        q, k = predictor.positioned(call.x, rotation_of(call))
        return predictor.document_scores(q, k, block_size, call.view.window, causal=causal, mass=mass)
    return block_scores(predictor.activity(call.x), block_size, causal)


def estimated_pairs(heads: ScoreHeads, call: BranchCall, block_size: int, mass: bool) -> Tensor:
    """What stands behind them in attention, of all pairs of blocks [n, n]."""
    return heads.pair_scores(*heads.positioned(call.x, rotation_of(call)), block_size, call.view.window, mass=mass)


def block_scores(scores: Tensor, block_size: int, causal: bool) -> Tensor:
    """Block scores [n] from `exact_scores`, or from activities."""
    if scores.dim() == 2:
        return attention_informativeness(scores, causal)
    score = block_means(scores, block_size)
    return from_predecessor(score) if causal else score


def _read_ledger(path: Path) -> dict[str, tuple[list[float], Sequence[Sequence[float]]]]:
    """What the file holds. A last line cut short by a kill is taken out of it; any other damage is an error."""
    if not path.is_file():
        return {}
    known = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
            known[value["thresholds"]] = (value["losses"], value["keep"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number == len(lines):
                write_text(path, "".join(f"{line}\n" for line in lines[:-1]))
                break
            raise UserError(f"{path}, line {number}, is damaged; calibrate into another --output") from error
    return known


def _append(path: Path, value: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")
        file.flush()
        os.fsync(file.fileno())
