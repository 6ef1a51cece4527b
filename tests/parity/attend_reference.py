"""What queries see on the `attend` axis, in plain loops, and the masked-dense run of unmodified modules.

Shapes: B batch, T tokens, H query heads, K key heads, d head size. A row is an index into the flattened B·T tokens.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lemo.models import get_runtime
from reference import all_boosts, all_listed, explicit_masks, hooks
from tiny import Batch, causal_lm, layers_of, window_of

Score = Callable[[int, int, int], float]


def heads_of(model: nn.Module) -> tuple[int, int]:
    """(H, K)."""
    config = causal_lm(model).config
    return config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads


@dataclass(frozen=True)
class Rule:
    """lemo.config.Attend, in plain loops over one document of `tokens` tokens in one layer."""

    tokens: int
    window: int | None
    settings: Any
    labelled: frozenset[int] = frozenset()

    @property
    def size(self) -> int:
        return self.settings.block

    def queries(self, i: int) -> range:
        return range(2 * self.size * i, min(2 * self.size * (i + 1), self.tokens))

    @property
    def query_blocks(self) -> range:
        return range(math.ceil(self.tokens / (2 * self.size)))

    def before(self, i: int) -> list[int]:
        """Key blocks before query block i of which it may see something."""
        first = 2 * self.size * i
        least = 0 if self.window is None else max(0, first - self.window + 1)
        return [j for j in range(2 * i) if (j + 1) * self.size > least]

    def share(self, blocks: int) -> float:
        """Density if every query block sees at most so many blocks before its own."""
        seen = total = 0
        for i in self.query_blocks:
            rows = len(self.queries(i))
            own = rows * (rows + 1) // 2
            seen += own + rows * self.size * min(blocks, len(self.before(i)))
            total += own + rows * self.size * len(self.before(i))
        return seen / total

    def budget(self) -> tuple[int, int]:
        """(blocks before its own that a query block sees, those of them in its window)."""
        asked = None if self.settings.window is None else math.ceil(self.settings.window / self.size)
        blocks = 2 if asked is None else asked + 1
        if self.settings.density is not None:
            while blocks < 2 * len(self.query_blocks) and self.share(blocks + 1) <= self.settings.density:
                blocks += 1
        if self.settings.choice == "none":
            return blocks, blocks - 1
        return blocks, blocks // 2 if asked is None else asked

    def listed(self, i: int, score: Callable[[int, int], float]) -> set[int]:
        """Key blocks that query block i sees, its own included."""
        before, (blocks, nearest) = self.before(i), self.budget()
        own = {j for j in (2 * i, 2 * i + 1) if j * self.size < self.tokens}
        if len(before) <= blocks or self.labelled.intersection(self.queries(i)):
            return own | set(before)
        window = set(range(2 * i - nearest, 2 * i))
        distant = sorted((j for j in before if j not in window), key=lambda j: (j != 0, -score(i, j)))
        return own | window | set(distant[: blocks - nearest])

    def leaves_out(self) -> bool:
        return any(len(self.before(i)) > self.budget()[0] for i in self.query_blocks)


def rules(model: nn.Module, batch: Batch, layer: int, settings: Any) -> list[Rule]:
    """One rule for each document."""
    window = window_of(model, layer)
    found = []
    for document in batch.documents:
        labelled = batch.labelled_rows() if settings.labelled == "dense" else set()
        inside = frozenset(row - document[0] for row in labelled.intersection(document))
        cuts = window is not None and window < max(map(len, batch.documents))
        found.append(Rule(len(document), window if cuts else None, settings, inside))
    return found


def reported(
    sparse: nn.Module, batch: Batch, layer: int, kept: list[list[int]] | None = None
) -> list[list[list[dict[int, float]]]]:
    """By document, key head and query block: key blocks that lemo says the last pass saw, counted in the document, and
    what it added to their scores.

    `kept`: each document's kept rows, where rows of lists count these alone.
    """
    runtime = get_runtime(sparse)
    assert runtime is not None
    lists = runtime.last_lists[layer]
    grid, size = lists.grid, lists.grid.key_block
    K = heads_of(sparse)[1]
    listed, boosts = all_listed(lists), all_boosts(lists)
    found: list[list[list[dict[int, float]]]] = []
    documents = batch.documents
    if kept is not None:
        starts = [sum(map(len, kept[:i])) for i in range(len(kept))]
        documents = [list(range(start, start + len(rows))) for start, rows in zip(starts, kept, strict=True)]
    for document in documents:
        found.append([])
        mine = [i for i, first in enumerate(grid.query_first.tolist()) if document[0] <= first <= document[-1]]
        for k in range(K):
            head = min(k, len(listed) - 1)
            rows = [listed[head][i] for i in mine]
            assert all(list_ == sorted(set(list_)) for list_ in rows), "lists ascend"
            added = [[0.0] * len(list_) for list_ in rows] if boosts is None else [boosts[head][i] for i in mine]
            found[-1].append(
                [
                    {(row - document[0]) // size: boost * math.log(2) for row, boost in zip(*both, strict=True)}
                    for both in zip(rows, added, strict=True)
                ]
            )
    return found


def seen_masks(dense: nn.Module, sparse: nn.Module, batch: Batch, settings: Any) -> list[Tensor]:
    """For each layer what the lists of the last pass add to scores, [B, H, T, T], -inf where queries don't see."""
    B, T = batch.input_ids.shape
    H, K = heads_of(dense)
    masks = []
    for layer in range(len(layers_of(dense))):
        mask = torch.full((B, H, T, T), -math.inf)
        window, lists = window_of(dense, layer), reported(sparse, batch, layer)
        for document, by_head in zip(batch.documents, lists, strict=True):
            b, first = document[0] // T, document[0] % T
            for h in range(H):
                for t in range(len(document)):
                    for j, added in by_head[h * K // H][t // (2 * settings.block)].items():
                        for s in range(j * settings.block, min((j + 1) * settings.block, t + 1)):
                            if window is None or t - s < window:
                                mask[b, h, first + t, first + s] = added
        masks.append(_without_blind_rows(mask).to(batch.input_ids.device))
    return masks


def _without_blind_rows(mask: Tensor) -> Tensor:
    """Rows that see nothing see themselves."""
    blind = torch.diag_embed((mask == -math.inf).all(-1))
    return mask.masked_fill(blind, 0.0)


def seen_among_kept(
    dense: nn.Module, sparse: nn.Module, batch: Batch, settings: Any, plans: dict[tuple[int, str], set[int]]
) -> list[Tensor]:
    """The same for `forward` mode, whose kept tokens see kept tokens: blocks count what is kept of a document."""
    B, T = batch.input_ids.shape
    H, K = heads_of(dense)
    masks = []
    for layer in range(len(layers_of(dense))):
        mask = torch.full((B, H, T, T), -math.inf)
        kept = [[row for row in document if row in plans[layer, "attention"]] for document in batch.documents]
        window, lists = window_of(dense, layer), reported(sparse, batch, layer, kept)
        for rows, by_head in zip(kept, lists, strict=True):
            for h in range(H):
                for n, row in enumerate(rows):
                    for j, added in by_head[h * K // H][n // (2 * settings.block)].items():
                        for other in rows[j * settings.block : min((j + 1) * settings.block, n + 1)]:
                            if window is None or row - other < window:
                                mask[row // T, h, row % T, other % T] = added
        masks.append(_without_blind_rows(mask).to(batch.input_ids.device))
    return masks


def masked_run(dense: nn.Module, batch: Batch, seen: list[Tensor], **call: Any) -> tuple[Tensor, list[Any]]:
    """Loss (with its graph) of unmodified modules under these masks; each layer's queries (scaled) and keys,
    positions applied, [B, H or K, T, d]."""
    captured: dict[tuple[int, str], Any] = {}

    def capture(key: tuple[int, str]) -> Any:
        return lambda module, args, output: captured.__setitem__(key, output.detach())

    def capture_rope(key: tuple[int, str]) -> Any:
        return lambda module, args, kwargs: captured.__setitem__(key, kwargs.get("position_embeddings"))

    handles = explicit_masks(dense, batch, seen=seen)
    for i, layer in enumerate(layers_of(dense)):
        heads: Any = layer.self_attn
        handles += [
            getattr(heads, "q_norm", heads.q_proj).register_forward_hook(capture((i, "q"))),
            getattr(heads, "k_norm", heads.k_proj).register_forward_hook(capture((i, "k"))),
            heads.register_forward_pre_hook(capture_rope((i, "rope")), with_kwargs=True),
        ]
    with hooks(handles):
        loss = dense(**batch.inputs(), **call).loss
    B, T = batch.input_ids.shape
    found = []
    for i, layer in enumerate(layers_of(dense)):
        heads = layer.self_attn
        q, k = (captured[i, name].reshape(B, T, -1, heads.head_dim).transpose(1, 2) for name in ("q", "k"))
        if captured[i, "rope"] is not None:
            module = importlib.import_module(type(causal_lm(dense)).__module__)
            q, k = module.apply_rotary_pos_emb(q, k, *captured[i, "rope"])
        found.append((q * heads.scaling, k))
    return loss, found


def pooled_score(q_HTd: Tensor, k_KTd: Tensor, rule: Rule) -> Score:
    """(key head, query block, key block) -> estimated mass; queries and keys of one document."""
    H, K = len(q_HTd), len(k_KTd)
    size = rule.size

    def logit(h: int, i: int, j: int) -> float:
        queries = rule.queries(i)
        q = q_HTd[h, queries.start : queries.stop].double().mean(0)
        k = k_KTd[h * K // H, j * size : min((j + 1) * size, rule.tokens)].double().mean(0)
        return float(q @ k)

    def mass(kv: int, i: int, j: int) -> float:
        visible = [*rule.before(i), *(o for o in (2 * i, 2 * i + 1) if o * size < rule.tokens)]
        mine = [h for h in range(H) if h * K // H == kv]
        return sum(
            math.exp(logit(h, i, j)) / sum(math.exp(logit(h, i, other)) for other in visible) for h in mine
        ) / len(mine)

    return mass
