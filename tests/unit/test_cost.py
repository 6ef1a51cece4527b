"""The count of a step's operations, against the units it is written in and a count by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lemo.bench.cost import attended_work, causal_work, grouped_work, kept_work, part_flop, step_flop
from lemo.bench.cost_memory import moved_bytes, stored_bytes
from lemo.bench.shapes import build_shape
from lemo.bench.step_config import load_step
from lemo.config import Attend
from lemo.selection.attend import build_grid, build_grid_of_kept, choose_blocks
from lemo.selection.layout import build_layout
from lemo.selection.ranking import plan_from_blocks


def test_by_hand() -> None:
    # SmolLM2: q and o 576 x 576, k and v 576 x 192, three of 576 x 1,536.
    linear = 2 * 1024 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    attention = 2 * 2 * 576 * 1024 * 1025 / 2
    # Logits, and the gradient of what enters the frozen head.
    head = 4 * 64 * 576 * 49152
    cost = step_flop("smollm2-135m", 2, 1024, 64, "lora+ckpt")
    assert cost == pytest.approx(2 * (3 * linear + 4.5 * attention) + head)
    assert step_flop("smollm2-135m", 2, 1024, 64, "lora") == pytest.approx(2 * (2 * linear + 3.5 * attention) + head)


def test_everything_kept_costs_what_checkpointing_costs() -> None:
    arguments = ("llama-3-8b", 8, 65536, 512)
    assert step_flop(*arguments, "lemo-backward") == pytest.approx(step_flop(*arguments, "lora+ckpt"))
    assert step_flop(*arguments, "lemo-backward", 0.25, 0.25) < 0.55 * step_flop(*arguments, "lora+ckpt")


def test_what_queries_dont_see_costs_nothing() -> None:
    arguments = ("llama-3-8b", 8, 65536, 512)
    attention = 8 * 4.5 * 2 * 65536 * 65537 * 4096
    dense = step_flop(*arguments, "lora+ckpt")
    assert step_flop(*arguments, "lemo-attend", density=0.15) == pytest.approx(dense - 0.85 * attention)
    both = step_flop(*arguments, "lemo-backward+attend", 0.25, 0.02, density=0.15)
    without = step_flop(*arguments, "lemo-backward", 0.25, 0.3)
    assert without - both == pytest.approx(attention / 4.5 * (0.85 + 3.5 * 0.28))


@pytest.mark.parametrize("kept", [None, [3, 9, 10, 15]])
def test_kept_queries_work_is_what_their_lists_hold(kept: list[int] | None) -> None:
    layout = build_layout(1, 20, 1, torch.device("cpu"))
    grid = build_grid(layout, Attend(block=2, density=0.5, choice="random"), 1, None)
    nothing = torch.zeros(1, 20, 4)
    lists = choose_blocks(grid, nothing, nothing, 1.0, lambda: 0)
    keep = torch.ones(20, dtype=torch.bool)
    if kept is not None:
        keep = torch.zeros(20, dtype=torch.bool)
        keep[kept] = True
    plans = {} if kept is None else {(0, "attention"): plan_from_blocks(keep, layout)}
    seen = lists.bias(torch.arange(20), 0, 20)[0] > float("-inf")
    share = float(seen[keep].sum()) / 210
    assert attended_work(plans, {0: grid}, 20) == pytest.approx(share)
    assert kept is not None or grid.density == pytest.approx(share)


def test_kept_tokens_work_is_what_their_lists_hold_among_themselves() -> None:
    """`forward` with `attend`: grids and lists count kept tokens, the share is still one of all tokens' attention."""
    layout = build_layout(1, 24, 2, torch.device("cpu"))
    keep = torch.zeros(12, dtype=torch.bool)
    keep[[0, 2, 3, 5, 6, 7, 9, 11]] = True
    plan = plan_from_blocks(keep, layout)
    grid = build_grid_of_kept(layout, plan, Attend(block=2, density=0.5), 1, None)
    nothing = torch.zeros(1, 16, 4)
    seen = choose_blocks(grid, nothing, nothing, 1.0).bias(torch.arange(16), 0, 16) > float("-inf")
    assert seen.sum() < 136, "nothing was left out"
    share = float(seen.sum()) / 300
    assert attended_work({(0, "attention"): plan}, {0: grid}, 24) == pytest.approx(share)
    everything = plan_from_blocks(torch.ones(12, dtype=torch.bool), layout)
    whole = build_grid_of_kept(layout, everything, Attend(block=2, density=0.5), 1, None)
    share = attended_work({(0, "attention"): everything}, {0: whole}, 24)
    assert share == pytest.approx(whole.density)


def test_parts_are_the_whole() -> None:
    parts = part_flop("llama-3-8b", 8, 65536, 512, 0.25, 0.3)
    assert sum(parts.values()) == pytest.approx(step_flop("llama-3-8b", 8, 65536, 512, "lemo-backward", 0.25, 0.3))
    assert parts["backward attention"] == pytest.approx(2.5 * parts["recompute attention"])
    # Keys and values are a twenty-sixth of Llama-3-8B's linears.
    assert parts["keys and values linears"] / parts["forward linears"] == pytest.approx(1 / 26)


@pytest.mark.parametrize(("rows", "share"), [(range(8), 1.0), ([6, 7], 15 / 36), ([0, 1], 3 / 36)])
def test_late_queries_are_most_of_the_work(rows: range | list[int], share: float) -> None:
    kept = torch.zeros(8, dtype=torch.bool)
    kept[list(rows)] = True
    plan = plan_from_blocks(kept, build_layout(1, 8, 1, torch.device("cpu")))
    assert causal_work([plan], 8) == pytest.approx(share)


def test_forward_leaves_out_what_it_leaves_out() -> None:
    # SmolLM2: q and o 576 x 576, k and v 576 x 192, three of 576 x 1,536; 3.25 score heads of 64 on average
    # have queries and keys, and products for each pair; an MLP predictor's first matrix 64 x 576.
    attention_linear, mlp_linear = 2 * 1024 * (2 * 576 * 576 + 2 * 576 * 192), 2 * 1024 * 3 * 576 * 1536
    attention = 2 * 2 * 576 * 1024 * 1025 / 2
    choice, head = 2 * 1024 * 576 * (2 * 208 + 64) + 1024 * 1025 * 208, 4 * 64 * 576 * 49152
    shape = ("smollm2-135m", 2, 1024, 64)
    for method, linear, attending in (("lemo-forward", 2, 3.5), ("lemo-forward+ckpt", 3, 4.5)):
        wanted = linear * (0.5 * attention_linear + 0.25 * mlp_linear) + attending * 0.3 * attention + choice
        assert step_flop(*shape, method, 0.5, 0.3, 0.25) == pytest.approx(2 * wanted + head)
    dense = step_flop(*shape, "lora")
    assert step_flop(*shape, "lemo-forward") == pytest.approx(dense + 2 * choice)
    assert dense - step_flop(*shape, "longlora", density=0.25) == pytest.approx(2 * 3.5 * attention * 0.75)


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_what_shifted_groups_leave_of_the_causal_work(groups: int) -> None:
    T = 4096
    group = T // groups
    within = [group] * groups, [group // 2, *[group] * (groups - 1), group // 2]
    assert pytest.approx(sum(n * n / 2 for half in within for n in half) / 2 / (T * T / 2)) == grouped_work(groups)


def test_stored_bytes_by_hand() -> None:
    """Llama-2-7B's shape: width 4,096, as many heads of keys, MLPs 11,008 wide."""
    D, F, targets = 4096, 11008, ("q_proj", "k_proj", "v_proj", "o_proj")
    # Two norms in fp32, four inputs of LoRA, q, k, v and attention's output, three of the MLP.
    lora = 2 * 2 * D + 4 * D + 4 * D + 3 * F
    assert stored_bytes("llama-2-7b", 32, 8192, "lora", targets) == 32 * 8192 * 2 * lora
    sparse = 0.5 * (D + 4 * D) + 0.25 * (D + 2 * F)
    assert stored_bytes("llama-2-7b", 32, 8192, "lemo-forward", targets, 0.5, 0.25) == 32 * 8192 * 2 * sparse
    assert stored_bytes("llama-2-7b", 32, 8192, "lora+ckpt", targets) == 32 * 8192 * 2 * D
    assert stored_bytes("llama-2-7b", 32, 8192, "lora", "all-linear") == 32 * 8192 * 2 * (lora + 2 * D + F)


def test_opt_by_hand() -> None:
    """No gate, as many heads of keys, MLPs four times as wide; the small one's norms follow the addition."""
    targets = ("q_proj", "k_proj", "v_proj", "out_proj")
    for shape, D in (("opt-1.3b", 2048), ("opt-350m", 1024)):
        # Two norms in fp32, four inputs of LoRA, q, k, v and attention's output, the activation.
        assert stored_bytes(shape, 24, 8192, "lora", targets) == 24 * 8192 * 2 * (4 + 4 + 4 + 4) * D
        # Of the activation a bit each.
        rows = 5 * D + (1 + 4 / 16) * D if shape == "opt-1.3b" else 5 * D + 4 / 16 * D
        norms = 0 if shape == "opt-1.3b" else 4 * D
        sparse = stored_bytes(shape, 24, 8192, "lemo-forward", targets, 0.5, 0.5)
        assert sparse == 24 * 8192 * 2 * (0.5 * rows + norms)
        every = stored_bytes(shape, 24, 8192, "lemo-forward", "all-linear", 0.5, 0.5)
        assert every - sparse == 24 * 8192 * 2 * 0.5 * (1 - 1 / 16) * 4 * D
    linear, attention = 2 * 1024 * 12 * 1024 * 1024, 2 * 1024 * 1025 * 1024
    # Its head takes 512 numbers a token.
    cost = step_flop("opt-350m", 2, 1024, 64, "lora")
    assert cost == pytest.approx(2 * (2 * linear + 3.5 * attention) + 4 * 64 * 512 * 50272)


def test_opts_longest_length_is_twice_what_lora_fits() -> None:
    file = Path(__file__).parents[2] / "benchmarks" / "step" / "forward_opt.yaml"
    config = load_step(file)
    for shape in config.shapes:
        *_, longest, twice = shape.lengths or ()
        weights = sum(p.numel() for p in build_shape(shape.name, 24, twice, torch.bfloat16, "meta").parameters()) * 2

        def gib(T: int, method: str, keep: float, name: str = shape.name, weights: int = weights) -> float:
            return (weights + stored_bytes(name, 24, T, method, config.lora.targets, keep, keep)) / 2**30

        # What a step needs besides is less than a tenth.
        assert 70 < gib(longest, "lora", 1.0) < 76
        assert gib(1.1 * longest, "lora", 1.0) > 80
        assert twice == 2 * longest
        assert gib(twice, "lemo-forward", 0.5) < 62


def test_more_kept_moves_more_and_weights_are_always_read() -> None:
    shape = ("llama-2-7b", 1, 8192)
    half, all_kept = (moved_bytes(*shape, "lemo-forward", k, k) for k in (0.5, 1.0))
    weights = 2 * 2 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    copies = 2 * 2 * 2 * 8192 * 4096
    assert half - weights - copies == pytest.approx((all_kept - weights - copies) / 2)
    assert moved_bytes(*shape, "lora+ckpt") > moved_bytes(*shape, "lora")


def test_kept_work() -> None:
    kept = torch.zeros(8, dtype=torch.bool)
    kept[[0, 3, 5, 7]] = True
    plan = plan_from_blocks(kept, build_layout(1, 8, 1, torch.device("cpu")))
    assert kept_work([plan], 8) == pytest.approx(10 / 36)


def test_backward_stores_layer_inputs_with_attend_too() -> None:
    arguments = ("llama-3-8b", 8, 8192)
    alone = stored_bytes(*arguments, "lemo-backward", "all-linear")
    assert alone == 8 * 8192 * 2 * 4096
    assert stored_bytes(*arguments, "lemo-backward+attend", "all-linear") == alone
