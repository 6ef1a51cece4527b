"""What a sparsified model's layers share: configuration, the current batch's layout, draws and statistics."""

from __future__ import annotations

import functools
import itertools
import logging
import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed import all_reduce, get_rank, is_available, is_initialized

from lemo.config import Attend, BranchSelection, SparsityConfig
from lemo.kernels.block_lists import BlockLists
from lemo.selection.attend import AttendGrid, build_grid, build_grid_of_kept
from lemo.selection.energy import block_energy, row_norms, select_by_energy
from lemo.selection.following import FollowingThresholds
from lemo.selection.layout import causal_bounds, refuse_padding
from lemo.selection.predictor import Predictor
from lemo.selection.ranking import plan_from_blocks, plan_of_everything
from lemo.selection.spans import DrawnSpans, draw_spans
from lemo.sparse.bypass import Bypass
from lemo.sparse.view import Rotary
from lemo.types import Mean, SequenceLayout, StepStats, TokenPlan

_log = logging.getLogger("lemo")


@dataclass
class BatchState:
    """One forward pass of the model, held by its layers until their backward.

    Attributes:
        layout: documents and blocks.
        spans: what the `segments` policy drew, else None.
        labelled: bool [blocks], blocks holding rows that enter the loss; known once the backward has begun.
        dense: whether everything is kept (`lemo.models.dense`).
        seed: of this pass's draws.
        rotary: transformers' (cos, sin) pair and its form with one line a row.
        by_bounds: whether the dense forward's attention takes bounds in a mask's place (`lemo.models.documents`).
        bounds: window -> int32 first and last key of each row.
        attend: what queries see; None: everything.
        targets: bool [B·T] on the CPU, rows that enter the loss; None where nothing asks for them.
        grids: (window, density) -> where the lists' blocks lie: of all rows, or in `forward` mode of a plan that keeps
            everything, which padding isn't part of.
    """

    layout: SequenceLayout
    spans: DrawnSpans | None = None
    labelled: Tensor | None = None
    dense: bool = False
    seed: str = ""
    rotary: tuple[Any, Rotary] | None = None
    by_bounds: bool = False
    bounds: dict[int | None, tuple[Tensor, Tensor]] = field(default_factory=dict)
    attend: Attend | None = None
    targets: Tensor | None = None
    grids: dict[Hashable, AttendGrid] = field(default_factory=dict)

    def draws(self, layer: int) -> random.Random:
        """One layer's draws: the same each time this pass's layer runs."""
        # Without one every pass would draw the same.
        assert self.seed, "begin draws a seed wherever something is left to chance"
        return random.Random(f"{self.seed} {layer}")

    @functools.cached_property
    def least_keep(self) -> float:
        """Share of the tokens in their documents' first and last blocks, which every selection keeps."""
        layout = self.layout.on_host
        return float(layout.block_tokens[layout.edge_block].sum()) / max(1, layout.real_tokens)

    def attend_grid(self, attend: Attend, heads: int, window: int | None) -> AttendGrid:
        """Where blocks lie for layers with that density and sliding window; made once for all of them."""
        key = window, attend.density
        if key not in self.grids:
            self.grids[key] = build_grid(self.layout, attend, heads, window, self.targets)
        return self.grids[key]

    def grid_of_kept(self, attend: Attend, plan: TokenPlan, heads: int, window: int | None) -> AttendGrid:
        """Where blocks lie among what a plan keeps; made once for the layers that keep everything."""
        key = window, attend.density
        if plan.keep == 1.0 and key in self.grids:
            return self.grids[key]
        grid = build_grid_of_kept(self.layout, plan, attend, heads, window, self.targets)
        if plan.keep == 1.0:
            self.grids[key] = grid
        return grid

    def bounds_of(self, window: int | None) -> tuple[Tensor, Tensor]:
        """First and last key of every row under that sliding window, int32 [B·T] each; made once for all layers."""
        if window not in self.bounds:
            rows = torch.arange(self.layout.rows, device=self.layout.block_of_row.device)
            lo, hi = causal_bounds(self.layout, rows, window)
            self.bounds[window] = lo.int(), hi.int()
        return self.bounds[window]


@dataclass
class Runtime:
    """Per-model state; see `lemo.models.get_runtime`.

    Attributes:
        config: what `sparsify` was given.
        layers: number of decoder layers.
        last_plans: (layer, 'attention' | 'mlp') -> plan of the last step.
        last_grids: layer -> where blocks lay in the last pass (`attend`).
        last_lists: layer -> what queries saw in it, if `keep_lists`: many bytes, which tests alone look at.
        bypasses: (layer, 'attention' | 'mlp') -> what `forward` gives the rows it leaves out of that branch.
        predictors: (layer, 'attention' | 'mlp') -> what gives `forward` that branch's scores in place of exact ones.
        following: a calibration's thresholds, which a Trainer moves; None where the user's choose, or a keep does.
        progress: share of the run's steps that are done, where its Trainer tells; None where nothing does.
        placement: (layout, labelled blocks, layer) -> blocks kept in the chosen ones' place; benchmarks alone set it.
        last_spans: drawn (first, end) rows of each document of the last batch (`segments`).
    """

    config: SparsityConfig
    layers: int
    last_plans: dict[tuple[int, str], TokenPlan] = field(default_factory=dict)
    last_grids: dict[int, AttendGrid] = field(default_factory=dict)
    last_lists: dict[int, BlockLists] = field(default_factory=dict)
    keep_lists: bool = False
    last_spans: tuple[tuple[tuple[int, int], ...], ...] = ()
    bypasses: dict[tuple[int, str], Bypass] = field(default_factory=dict)
    predictors: dict[tuple[int, str], Predictor] = field(default_factory=dict)
    state: BatchState | None = None
    sparse_in_eval: bool = False
    dense_only: bool = False
    # Whether checkpoints hold bypasses that train, or the user knows that they don't.
    bypasses_kept: bool = False
    progress: float | None = None
    following: FollowingThresholds | None = None
    placement: Callable[[SequenceLayout, Tensor, int], Tensor] | None = None
    _keeps: dict[tuple[int, str], Mean] = field(default_factory=lambda: defaultdict(Mean))
    _fidelities: dict[int, Mean] = field(default_factory=lambda: defaultdict(Mean))
    _density: Mean = field(default_factory=Mean)

    def begin(self, layout: SequenceLayout, training: bool, targets: Tensor | None) -> BatchState:
        """Starts a forward pass.

        Args:
            layout: the batch's.
            training: whether the model is in training mode.
            targets: bool [B·T], rows that enter the loss; None where that is computed elsewhere.

        Raises:
            ValueError: padding enters the loss; or the `segments` policy or `attend.labelled` is on, and the loss isn't
                computed by the sparsified model; or bypasses that should train can't.
        """
        if targets is not None:
            refuse_padding(layout, targets)
        self.state = BatchState(layout, dense=self.dense_only)
        if training and self.config.train_bypass:
            self._check_bypasses()
        if training and self._draws:
            # Ranks that began with one seed run dense together, since none waits then, but draw each on its own: their
            # documents differ.
            drawn = _draw_from_torch()
            self.state.seed = f"{drawn} {get_rank() if is_available() and is_initialized() else 0}"
            if not self.dense_only and self._is_dense_pass(drawn):
                self.state.dense = True
                # Mode `backward` notes what it keeps in its backward, whatever the pass.
                if self.config.mode != "backward":
                    for layer, branch in itertools.product(range(self.layers), ("attention", "mlp")):
                        self._keeps[layer, branch].add(1.0)
                if self.config.attend is not None:
                    self._density.add(1.0, self.layers)
        if training and not self.state.dense:
            self._begin_attend(self.state, targets)
        if training and self.config.policy == "segments" and not self.dense_only:
            if targets is None:
                raise ValueError(
                    "policy='segments' draws spans and weights their loss, but this loss is computed outside the "
                    "model (TRL's SFTTrainer uses its own fused head). Use transformers.Trainer or `lemo finetune`, "
                    "which pass labels to the model, or choose policy='energy'"
                )
            self.state.spans = draw_spans(layout, self.config.segments, random.Random(self.state.seed))
            self.last_spans = self.state.spans.ranges
        return self.state

    @property
    def _draws(self) -> bool:
        """Whether anything is left to chance."""
        attend = self.config.attend
        by_chance = self.config.policy != "energy" or (attend is not None and attend.choice in ("random", "sampled"))
        return by_chance or bool(self.config.dense_share)

    def observe(self, state: BatchState, layer: int, attention: TokenPlan, mlp: TokenPlan) -> None:
        """Notes a layer's plans in a training pass for the thresholds that follow."""
        # A layer that a wrapper runs again for its backward was seen before; without gradients nobody trains.
        if self.following is None or state is not self.state or not torch.is_grad_enabled():
            return
        self.following.observe((layer, "attention"), attention.keep, state.least_keep)
        self.following.observe((layer, "mlp"), mlp.keep, state.least_keep)

    def move_thresholds(self, device: torch.device | str) -> None:
        """Lets the thresholds that follow count what the last step kept, on average over ranks: each must call.

        Args:
            device: where ranks exchange tensors.
        """
        if self.following is None:
            return
        seen = self.following.take_seen()
        if is_available() and is_initialized():
            shared = seen.to(device)
            all_reduce(shared)
            seen = shared.cpu()
        self.following.advance(seen)
        self.take_thresholds()

    def take_thresholds(self) -> None:
        """Puts the thresholds that follow, as they are now, into the configuration."""
        following = self.following
        assert following is not None, "a calibration's thresholds choose"
        changes = {branch: BranchSelection(threshold=following.of(branch)) for branch in following.branches}
        self.config = self.config.model_copy(update=changes)

    def _is_dense_pass(self, drawn: int) -> bool:
        at = random.Random(drawn).random() if self.progress is None else self.progress
        return at < (self.config.dense_share or 0.0)

    def _begin_attend(self, state: BatchState, targets: Tensor | None) -> None:
        attend = state.attend = self.config.attend
        if attend is None or attend.labelled == "sparse":
            return
        if targets is None:
            raise ValueError(
                "attend.labelled='dense' must see the labels, but this loss is computed outside the model; call it "
                "with labels, or choose labelled='sparse'"
            )
        state.targets = targets.cpu()

    def _check_bypasses(self) -> None:
        parameters = [p for bypass in self.bypasses.values() for p in bypass.parameters()]
        if not parameters:
            raise ValueError(
                "train_bypass has no bypasses to train; give a calibration that has some, or call "
                "lemo.models.fit_bypasses"
            )
        if not all(p.requires_grad for p in parameters):
            raise ValueError(
                "the bypasses are frozen; wrap the model in PEFT before lemo.sparsify, or set train_bypass=False"
            )
        if not self.bypasses_kept:
            self.bypasses_kept = True
            _log.warning(
                "train_bypass: checkpoints of a PEFT model hold the adapter alone; to resume with the bypasses as "
                "trained, give the Trainer callbacks=[lemo.training.SparsityCallback()]"
            )

    def choose(self, state: BatchState, layer: int, grad_BTD: Tensor) -> TokenPlan:
        """The plan of one layer in `backward` mode, from the gradient at its output.

        Raises:
            ValueError: padding has a gradient, or labelled blocks exceed `keep`.
        """
        if layer == self.layers - 1 and state.layout.real_tokens < state.layout.rows:
            # A loss computed elsewhere is known by its gradient alone.
            refuse_padding(state.layout, row_norms(grad_BTD) > 0)
        if state.spans is not None and not state.dense:
            plan = state.spans.plan
        elif state.dense:
            plan = plan_of_everything(state.layout, fidelity=1.0)
        else:
            energy = block_energy(grad_BTD, state.layout)
            if state.labelled is None:
                # The first layer to run backward is the last: only rows that enter the loss have a gradient there.
                state.labelled = energy != 0
            draws = state.draws(layer) if self.config.policy == "random" else None
            plan = select_by_energy(
                energy,
                state.layout,
                self.config.fidelity,
                self.config.keep,
                state.labelled if self.config.labelled == "always" else None,
                priority=None if draws is None else _numbers(draws, energy),
                sink=self.config.keep_sink and draws is None,
            )
            if self.placement is not None:
                plan = plan_from_blocks(self.placement(state.layout, state.labelled, layer), state.layout)
        self.record(layer, plan, plan)
        return plan

    def record(self, layer: int, attention: TokenPlan, mlp: TokenPlan) -> None:
        """Notes a layer's plans for `collect`."""
        for branch, plan in (("attention", attention), ("mlp", mlp)):
            self.last_plans[layer, branch] = plan
            self._keeps[layer, branch].add(plan.keep)
        if attention.fidelity is not None:
            self._fidelities[layer].add(attention.fidelity)

    def record_lists(self, layer: int, grid: AttendGrid, lists: BlockLists) -> None:
        """Notes what a layer's queries saw."""
        self.last_grids[layer] = grid.bare()
        if self.keep_lists:
            self.last_lists[layer] = lists
        self._density.add(grid.density)

    def collect(self) -> StepStats:
        """Averages since the last call, then starts anew."""

        def mean(values: Mean | None, otherwise: Any) -> Any:
            return values.total / values.count if values is not None and values.count else otherwise

        stats = StepStats(
            keep=tuple(
                (mean(self._keeps.get((i, "attention")), 1.0), mean(self._keeps.get((i, "mlp")), 1.0))
                for i in range(self.layers)
            ),
            fidelity=tuple(mean(self._fidelities.get(i), None) for i in range(self.layers)),
            density=mean(self._density, None),
        )
        self._keeps.clear()
        self._fidelities.clear()
        self._density = Mean()
        return stats


def _draw_from_torch() -> int:
    """A number from torch's stream: `torch.manual_seed` and the random state of a checkpoint, be it transformers' or an
    activation checkpoint's, bring the same draws again."""
    return int(torch.randint(2**63 - 1, (), device="cpu"))


def _numbers(draws: random.Random, energy: Tensor) -> Tensor:
    """One for each block, [blocks]: keeping the largest keeps blocks drawn without replacement."""
    return torch.tensor([draws.random() for _ in range(energy.numel())], dtype=torch.float64, device=energy.device)


@contextmanager
def flag(runtime: Runtime, name: str, value: Any) -> Iterator[None]:
    """Sets a switch of the runtime, or its configuration, for a while."""
    before = getattr(runtime, name)
    setattr(runtime, name, value)
    try:
        yield
    finally:
        setattr(runtime, name, before)
