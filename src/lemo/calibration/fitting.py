"""Fits predictors and bypasses to a stream of sequences, in one pass of the frozen dense model."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lemo.calibration.config import CalibrationConfig
from lemo.models.bypasses import add_to_fit
from lemo.models.calibration import BRANCHES
from lemo.models.watching import BranchCall, watch
from lemo.selection.examples import Example, keep_newest
from lemo.selection.head_choice import Choice, allot, begin_heads, choices, recall_of
from lemo.selection.predictor import ActivityPredictor, Predictor
from lemo.selection.predictor_training import PredictorTraining
from lemo.selection.score_heads import Rotate, ScoreHeads
from lemo.selection.score_heads_training import HeadsExample, HeadsTraining, part_of
from lemo.selection.scores import attention_informativeness, block_pair_scores
from lemo.sparse.bypass import Bypass, BypassFit
from lemo.types import Key

# Documents that say which layers get how many heads, and blocks that they have at least, if some are so long.
_CHOOSING, _LEAST_BLOCKS = 5, 8


@dataclass(frozen=True)
class Fitted:
    """By (layer, branch): predictors, bypasses; numbers in each predictor before it shrank; variance explained."""

    predictors: dict[Key, Predictor]
    bypasses: dict[Key, Bypass]
    first_size: dict[Key, int]
    explained: dict[Key, float]


def exact_scores(call: BranchCall, block_size: int, mass: bool) -> Tensor:
    """What a predictor is to estimate of one document: pair scores [n, n], or activities of its tokens [N]."""
    if call.branch == "attention":
        return block_pair_scores(*queries_keys(call), call.view.scaling, block_size, call.view.window, mass)
    return call.view.mlp_activity(call.x)


def queries_keys(call: BranchCall) -> tuple[Tensor, Tensor]:
    """Positioned queries [H, N, d] and keys [K, N, d]."""
    key, _ = call.view.key_value(call.x, call.rotary)
    return call.view.query(call.x, call.rotary), key


def rotation_of(call: BranchCall) -> Rotate:
    """Positions heads of the call's rows as the layer does its own."""
    return functools.partial(call.view.rotate, rotary=call.rotary)


@torch.no_grad()
def fit(
    model: Any, sequences: Iterable[Tensor], count: int, config: CalibrationConfig, told: Callable[[int], None]
) -> Fitted:
    """Predictors and bypasses of every layer's branches that may leave blocks out.

    Args:
        model: sparsified with mode `forward`, in evaluation mode.
        sequences: token ids [T] on the model's device; read one at a time.
        count: how many there are.
        config: sizes and schedules.
        told: called with the number of sequences seen.
    """
    torch.manual_seed(config.seed)
    kinds: dict[str, _Fit] = {"attention": _AttentionFit(config, count), "mlp": _ActivityFit(config, count)}
    chosen = {branch: kinds[branch] for branch in BRANCHES if config.branches in ("both", branch)}
    fits: dict[Key, BypassFit] = {}

    def visit(call: BranchCall) -> None:
        if call.branch not in chosen:
            return
        chosen[call.branch].visit(call)
        if config.bypass_rank:
            add_to_fit(fits, call, torch.ones(call.x.shape[0], dtype=torch.bool, device=call.x.device))

    with watch(model, visit):
        for number, ids in enumerate(sequences, start=1):
            model.get_decoder()(input_ids=ids[None], use_cache=False)
            for one in chosen.values():
                one.learn()
            told(number)
    solved = {key: fit.solve(min(config.bypass_rank, fit.width)) for key, fit in fits.items()}
    finished = {branch: one.finish() for branch, one in chosen.items()}
    return Fitted(
        predictors={(i, branch): one for branch, (found, _) in finished.items() for i, one in enumerate(found)},
        bypasses={key: bypass for key, (bypass, _) in solved.items()},
        first_size={(i, branch): size for branch, (found, size) in finished.items() for i in range(len(found))},
        explained={key: explained for key, (_, explained) in solved.items()},
    )


class _Fit(Protocol):
    """Predictors of one branch of all layers on their way."""

    def visit(self, call: BranchCall) -> None:
        """A layer's call of the document that is running."""

    def learn(self) -> None:
        """Trains on that document."""

    def finish(self) -> tuple[Sequence[Predictor], int]:
        """The predictors, one a layer, and the numbers in each before it shrank."""


class _AttentionFit:
    """Score heads: chosen by the first documents that have blocks to choose among, then trained, unless scores are
    masses, which no training knows."""

    def __init__(self, config: CalibrationConfig, count: int) -> None:
        self.config, self.count = config, count
        self._mass, self._causal = config.score == "mass", config.score == "causal"
        self._shared = config.predictor.size < 1
        # Several, where they say how many heads a layer gets; else all get as many.
        self._wanted = _CHOOSING if self._shared else 1
        self._least = min(_LEAST_BLOCKS, max(1, config.data.max_tokens // (2 * config.block_size)))
        self._layers: list[_Begun] = []
        self._seen: list[tuple[Tensor, Tensor, Rotate]] = []
        self._waiting: deque[HeadsExample] = deque()
        self._heads: list[ScoreHeads] = []
        self._first_size = 0
        self._training: HeadsTraining | None = None
        self._documents = self._judged = 0
        self._judging = False

    def visit(self, call: BranchCall) -> None:
        q, k = queries_keys(call)
        view, size = call.view, self.config.block_size
        self._judging = self._judges(call.x.shape[0])
        if self._judging:
            self._judge(call, q, k)
        if not self._mass:
            exact = block_pair_scores(q, k, view.scaling, part_of(size, call.x.shape[0]), view.window)
            self._seen.append((call.x, exact, rotation_of(call)))

    def learn(self) -> None:
        self._judged += self._judging
        self._judging = False
        self._documents += 1
        if self._seen:
            self._waiting.append(_example(self._seen))
            self._seen.clear()
            keep_newest(self._waiting, self.config.predictor.memory_gib)
        if not self._heads and (self._judged == self._wanted or self._documents == self.count):
            self._begin()
        if self._training is not None:
            until = self.config.predictor.head_steps * self._documents // self.count
            while self._waiting:
                self._training.see(self._waiting.popleft(), until if not self._waiting else 0)

    def _judges(self, tokens: int) -> bool:
        """Whether a document says which heads are chosen; the last one must if no other has."""
        blocks, last = -(-tokens // self.config.block_size), self._documents + 1 == self.count
        return self._judged < self._wanted and (blocks >= self._least or (last and not self._judged))

    def _judge(self, call: BranchCall, q: Tensor, k: Tensor) -> None:
        view, size = call.view, self.config.block_size
        where = view.scaling, size, view.window
        if not self._judged:
            count = self.config.predictor.heads(view.head_size, len(q))
            # A hard layer may get more heads than there are on average.
            most = 2 * count if self._shared else count
            made = choices(q, k, view.scaling, most, size, view.window, self._mass)
            like, group = call.x[:1].clone(), len(q) // len(k)
            self._layers.append(_Begun(view, like, count, len(q), group, made, [0.0] * len(made)))
        if self._shared:
            begun = self._layers[call.layer]
            exact = attention_informativeness(block_pair_scores(q, k, *where, self._mass), self._causal)
            for n, choice in enumerate(begun.choices):
                begun.recalls[n] += recall_of(choice, q, k, exact, *where, causal=self._causal, mass=self._mass)

    def _begin(self) -> None:
        config, layers = self.config, self._layers
        query, _ = layers[0].view.head_projections(layers[0].like)
        self._first_size = 2 * layers[0].count * query.size
        if self._shared:
            sizes = [
                [query.size * (len(c.heads) + len(c.keys(begun.group))) for c in begun.choices] for begun in layers
            ]
            most = int(config.predictor.size * self._first_size * len(layers))
            counts = allot([begun.recalls for begun in layers], sizes, most)
        else:
            counts = [begun.count for begun in layers]
        for begun, count in zip(layers, counts, strict=True):
            projections = begun.view.head_projections(begun.like)
            choice = begun.choices[count - 1]
            self._heads.append(
                begin_heads(projections, choice, begun.view.scaling, shared=self._shared, mass=self._mass)
            )
        if not self._mass:
            windows = [begun.view.window for begun in layers]
            still = [layer for layer, begun in enumerate(layers) if self._heads[layer].count == begun.own]
            # The first one says the scores' unit, and short ones' are odd.
            self._waiting = deque(sorted(self._waiting, key=lambda d: -d.x.shape[1]))
            self._training = HeadsTraining(
                self._heads, windows, config.block_size, config.predictor, still=still, seed=config.seed
            )

    def finish(self) -> tuple[Sequence[ScoreHeads], int]:
        return self._heads if self._training is None else self._training.finish(), self._first_size


def _example(seen: Sequence[tuple[Tensor, Tensor, Rotate]]) -> HeadsExample:
    """A document of all layers' inputs, exact scores and rotations; nothing else refers to the stacked ones."""
    x, exact, rotate = zip(*seen, strict=True)
    return HeadsExample(torch.stack(x), torch.stack(exact), rotate)


@dataclass(frozen=True)
class _Begun:
    """What is known of a layer before its heads begin.

    Attributes:
        view: of the layer.
        like: an input of its attention.
        count: heads where none are taken away.
        own: the layer's query heads.
        group: how many of them share a key head.
        choices: of 1, 2, ... heads.
        recalls: what each is worth; a sum over documents.
    """

    view: Any
    like: Tensor
    count: int
    own: int
    group: int
    choices: Sequence[Choice]
    recalls: list[float]


class _ActivityFit:
    """Networks for MLPs."""

    def __init__(self, config: CalibrationConfig, count: int) -> None:
        self.config = config
        self._steps = -(-config.predictor.steps // count)
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._training: PredictorTraining | None = None
        self._first_size = 0

    def visit(self, call: BranchCall) -> None:
        self._seen.append((call.x, call.view.mlp_activity(call.x)))

    def learn(self) -> None:
        config = self.config
        example = Example(*(torch.stack(values) for values in zip(*self._seen, strict=True)))
        self._seen.clear()
        if self._training is None:
            L, _, D = example.x.shape
            begun = [ActivityPredictor(D, config.predictor.widths).to(example.x.device) for _ in range(L)]
            self._first_size = begun[0].size
            self._training = PredictorTraining(begun, config.block_size, config.predictor, config.seed)
        self._training.see(example, self._steps)

    def finish(self) -> tuple[Sequence[ActivityPredictor], int]:
        assert self._training is not None, "no sequence was seen"
        return self._training.finish(), self._first_size
