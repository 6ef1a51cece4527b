"""Score heads: all true heads together give the exact scores; fewer are chosen well; batches are their documents."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from attention_calls import SIZE, TOKENS, attention_calls, begun, call_of, queries_keys, rotate_of
from lemo.models.watching import BranchCall
from lemo.selection.head_choice import allot, begin_heads, choices, recall_of
from lemo.selection.layout import build_layout
from lemo.selection.score_errors import recall
from lemo.selection.score_heads import ScoreHeads, heads_of, random_heads
from lemo.selection.scores import attention_informativeness, best_pairs, block_pair_scores

FAMILIES = ["llama", "mistral", "qwen2", "qwen2-window", "qwen3", "opt"]


def pairs_of(heads: ScoreHeads, call: BranchCall, mass: bool = False) -> Tensor:
    q, k = heads.positioned(call.x, rotate_of(call))
    return heads.pair_scores(q, k, SIZE, call.view.window, mass=mass)


def exact_of(call: BranchCall, mass: bool = False) -> Tensor:
    return block_pair_scores(*queries_keys(call), call.view.scaling, SIZE, call.view.window, mass)


@pytest.mark.parametrize("shared", [False, True], ids=["own keys", "shared keys"])
@pytest.mark.parametrize("mass", [False, True], ids=["paper", "mass"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_heads_are_exact(family: str, mass: bool, shared: bool) -> None:
    """Groups that share keys, biases, norms of heads, windows, and positions that aren't rotations."""
    call = call_of(family)
    heads = begun(call, 4, mass, shared)
    assert heads.count == 4
    assert len(heads.key.matrix) == (len(queries_keys(call)[1]) if shared else 4)
    assert (heads.query.gain is not None) == (family == "qwen3")
    wanted = exact_of(call, mass)
    torch.testing.assert_close(pairs_of(heads, call, mass), wanted, rtol=1e-4, atol=1e-5)
    layout = build_layout(1, TOKENS, SIZE, torch.device("cpu"))
    for causal in (False, True):
        found = heads.scores(call.x, None, None, rotate_of(call), layout, call.view.window, causal=causal, mass=mass)
        torch.testing.assert_close(found, attention_informativeness(wanted, causal), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "opt"])
def test_adapters_count(family: str) -> None:
    call = attention_calls(family, lora=True)[1]
    torch.testing.assert_close(pairs_of(begun(call, 4), call), exact_of(call), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_more_heads_tell_more(family: str) -> None:
    call = call_of(family)
    wanted = exact_of(call)
    errors = [float((pairs_of(begun(call, count), call) - wanted).square().mean()) for count in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    assert begun(call, 9).count == 4


def test_the_heads_that_tell_most_are_chosen_and_weighted() -> None:
    """Of three heads one is silent and one a third of the loudest."""
    torch.manual_seed(0)
    call = call_of("llama")
    q, k = queries_keys(call)
    q, k = q[:3], k[:1].expand(3, -1, -1)
    q = torch.stack([torch.zeros_like(q[0]), q[1], 3 * q[1]])
    query, key = call.view.head_projections(call.x)
    made = choices(q, k[:1], 1.0, 1, SIZE, None)
    heads = begin_heads((query, key), made[0], 1.0, shared=False)
    torch.testing.assert_close(heads.query.matrix[0], query.matrix[2] * (4 / 9), rtol=1e-4, atol=1e-6)


def test_choices_contain_each_other() -> None:
    call = call_of("llama")
    made = choices(*queries_keys(call), call.view.scaling, 9, SIZE, None)
    assert [len(choice.heads) for choice in made] == [1, 2, 3, 4]
    assert all(b.heads[:-1] == a.heads for a, b in itertools.pairwise(made))


@pytest.mark.parametrize("causal", [False, True])
def test_recall_of_a_choice_is_that_of_its_estimates(causal: bool) -> None:
    call = call_of("opt")
    q, k = queries_keys(call)
    exact = attention_informativeness(exact_of(call), causal)
    where = exact, call.view.scaling, SIZE, call.view.window
    projections, worth = call.view.head_projections(call.x), []
    for choice in choices(q, k, call.view.scaling, 4, SIZE, call.view.window):
        worth.append(recall_of(choice, q, k, *where, causal=causal, mass=False))
        pairs = pairs_of(begin_heads(projections, choice, call.view.scaling, shared=True), call)
        found = attention_informativeness(pairs, causal)
        wanted = sum(recall(found, exact, share) for share in (0.3, 0.4, 0.5, 0.6, 0.7)) / 5
        assert worth[-1] == pytest.approx(wanted)
    assert worth[-1] == 1.0
    assert worth[0] < 1.0


@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_all_heads_are_exact_whatever_chose_them(tokens: int) -> None:
    """A short document leaves the weights of a layer's heads open."""
    short, call = attention_calls("llama", tokens)[1], call_of("llama")
    made = choices(*queries_keys(short), short.view.scaling, 4, SIZE, None)
    heads = begin_heads(call.view.head_projections(call.x), made[-1], call.view.scaling, shared=False)
    torch.testing.assert_close(pairs_of(heads, call), exact_of(call), rtol=1e-4, atol=1e-5)


def test_heads_go_where_they_add_most() -> None:
    """The second layer needs two more at once; the third's second costs twice as much and adds as little."""
    recalls = [[0.7, 0.8, 0.81], [0.5, 0.5, 0.9], [0.9, 0.92, 0.92]]
    sizes = [[2, 3, 4], [2, 3, 4], [2, 4, 5]]
    assert allot(recalls, sizes, 6) == [1, 1, 1]
    assert allot(recalls, sizes, 7) == [2, 1, 1]
    assert allot(recalls, sizes, 8) == [1, 3, 1]
    assert allot(recalls, sizes, 9) == [2, 3, 1]
    assert allot(recalls, sizes, 100) == [3, 3, 2]
    assert allot(recalls, sizes, 0) == [1, 1, 1], "one in each there is"


@pytest.mark.parametrize("window", [None, 11])
def test_best_pairs_make_the_scores(window: int | None) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(4, TOKENS, 6), torch.randn(2, TOKENS, 6)
    wanted = block_pair_scores(q, k, 0.3, SIZE, window)
    queries, keys, there = best_pairs(q, k, SIZE, window)
    products = (q[:, queries] * k.repeat_interleave(2, 0)[:, keys]).sum(-1)
    torch.testing.assert_close((0.3 * products).relu().mean(0).where(there, 0.0), wanted)
    seen = queries - keys
    assert (seen[there] >= 0).all()
    assert (seen[there] < (window or TOKENS)).all()
    blocks = torch.arange(len(wanted))
    assert (queries // SIZE == blocks[:, None]).all()
    assert (keys // SIZE == blocks).all()
    assert not there.triu(1).any()


@pytest.mark.parametrize("lengths", [(25, 35), (16, 16), (3, 40, 8, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_a_batch_is_its_documents(causal: bool, lengths: tuple[int, ...]) -> None:
    heads, x = random_heads(2, 2, 6, 12), torch.randn(sum(lengths), 12)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    layout = build_layout(1, len(x), SIZE, torch.device("cpu"), position_ids=positions)
    found = heads.scores(x, None, None, unmoved, layout, None, causal=causal, mass=False)
    parts = []
    for a, b in layout.documents:
        alone = build_layout(1, b - a, SIZE, torch.device("cpu"))
        parts.append(heads.scores(x[a:b], None, None, unmoved, alone, None, causal=causal, mass=False))
    torch.testing.assert_close(found, torch.cat(parts))


def unmoved(heads: Tensor) -> Tensor:
    return heads.transpose(0, 1)


@pytest.mark.parametrize(("causal", "mass"), [(False, False), (True, False), (False, True)])
def test_long_documents_are_sampled_where_sums_over_queries_count(causal: bool, mass: bool) -> None:
    heads, T = random_heads(2, 2, 6, 12), 20 * 128
    x = torch.randn(T, 12)
    q, k = heads.positioned(x, unmoved)
    layout = build_layout(1, T, 64, torch.device("cpu"))
    found = heads.scores(x, None, None, unmoved, layout, None, causal=causal, mass=mass)
    sampled = not (causal or mass)
    pairs = block_pair_scores(q, k, 1.0 if mass else 2.0, 64, None, mass, sampled=sampled)
    torch.testing.assert_close(found, attention_informativeness(pairs, causal))
    if sampled:
        assert (pairs.sum(0) != heads.pair_scores(q, k, 64, None).sum(0)).any()


def test_autocast_changes_no_score() -> None:
    heads, x = random_heads(2, 2, 6, 12), torch.randn(40, 12)
    layout = build_layout(1, 40, SIZE, torch.device("cpu"))
    wanted = heads.scores(x, None, None, unmoved, layout, None, causal=False, mass=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(heads.scores(x, None, None, unmoved, layout, None, causal=False, mass=False), wanted)


def test_causal_scores_dont_look_ahead() -> None:
    heads, x = random_heads(2, 2, 6, 12), torch.randn(45, 12)
    layout = build_layout(1, 45, SIZE, torch.device("cpu"))
    changed = x.clone()
    changed[3 * SIZE :] += 1
    before, after = (heads.scores(v, None, None, unmoved, layout, None, causal=True, mass=False) for v in (x, changed))
    torch.testing.assert_close(before[:4], after[:4], rtol=0, atol=0)
    assert not torch.equal(before[4:], after[4:])


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_half_precision(family: str) -> None:
    call = attention_calls(family, dtype=torch.bfloat16)[1]
    heads = begun(call, 4)
    assert heads.query.matrix.dtype == torch.float32
    torch.testing.assert_close(pairs_of(heads, call), exact_of(call), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_heads_come_back_from_their_tensors(family: str) -> None:
    call = call_of(family)
    heads = begun(call, 2, shared=True)
    state = heads.state_dict()
    again = heads_of(state)
    assert torch.equal(pairs_of(again, call), pairs_of(heads, call))
    assert again.size == heads.size
    for name in state:
        with pytest.raises((KeyError, RuntimeError)):
            heads_of({key: value for key, value in state.items() if key != name})


def test_moved_heads_are_stacked_anew() -> None:
    heads, x = random_heads(2, 2, 6, 12), torch.randn(40, 12)
    before = heads.positioned(x, unmoved)[0]
    heads.double()
    heads.query.matrix.data.mul_(2)
    after = heads.positioned(x.double(), unmoved)[0]
    torch.testing.assert_close(after, 2 * before.double(), rtol=1e-5, atol=1e-5)
