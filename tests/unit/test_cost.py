"""The count of a step's operations, against the units it is written in and a count by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lemo.bench.cost import grouped_work, kept_work, step_flop
from lemo.bench.cost_memory import moved_bytes, stored_bytes
from lemo.bench.shapes import build_shape
from lemo.bench.step_config import load_step
from lemo.selection.layout import build_layout
from lemo.selection.ranking import plan_from_blocks


def test_by_hand() -> None:
    # SmolLM2: q and o 576 x 576, k and v 576 x 192, three of 576 x 1,536; score heads of 64, on average 6.5 of queries
    # and keys together, a third of them keys, and products of queries for each pair; an MLP predictor's first matrix
    # 64 x 576.
    attention_linear, mlp_linear = 2 * 1024 * (2 * 576 * 576 + 2 * 576 * 192), 2 * 1024 * 3 * 576 * 1536
    attention = 2 * 2 * 576 * 1024 * 1025 / 2
    choice, head = 2 * 1024 * 576 * (416 + 64) + 1024 * 1025 * 416 * 2 / 3, 4 * 64 * 576 * 49152
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
