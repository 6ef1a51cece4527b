"""Which launch is best for each block-sparse kernel: `python -m benchmarks.sweep_attend TOKENS`, about a minute,
to set `lemo.kernels.launches` by.

Each kernel runs alone, by every launch that fits, for key blocks of 64 and 128, all rows and every eighth. Rates count
the products that the kernel computes: two in the forward, three for queries, four for keys and values. A launch whose
numbers differ from those of one stage and small tiles is WRONG: pipelined loops have been, in silence (docs/LOG.md).
Launches are compiled by several processes first.
"""

from __future__ import annotations

import itertools
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from benchmarks.record_attend import DENSITIES, KEPT_EVERY, SCALE, D, H, setting
from lemo.bench.cost import TERA
from lemo.bench.timing import time_calls
from lemo.kernels.block_sparse import Queries, block_sparse_forward, key_gradients, query_gradient
from lemo.kernels.launches import Launch, Launches, launches_for
from lemo.selection.attend import choose_blocks

DEVICE = "cuda"
PRODUCTS = {"forward": 2, "queries": 3, "keys": 4}
BLOCKS = (64, 128)
PROCESSES = 12
# As many tokens as give the large size's specialisations: strides that 16 divides.
COMPILED_TOKENS = 4096
# Of the largest row's error and of all; order of sums and bf16's rounding alone stay far below.
ROW_ERROR, ERROR = 5e-2, 2e-3
Run = Callable[[Launch], tuple[Tensor, ...]]


def candidates(kernel: str, block: int) -> list[Launch]:
    """Launches whose accumulators a program's registers can hold, narrow tiles first."""
    found = []
    for (lanes, warps), keys, stages in itertools.product(
        ((32, 4), (64, 4), (64, 8), (128, 4), (128, 8)), (64, 128), (1, 2, 3)
    ):
        tma = (False, True) if stages > 1 else (False,)
        # Numbers a thread holds: scores and their gradients, and what a kernel adds up.
        scores = lanes * keys * (1 if kernel == "forward" else 2)
        sums = 2 * keys * D if kernel == "keys" else lanes * D
        if keys > block or scores + sums > 220 * 32 * warps:
            continue
        if kernel == "keys" and (warps == 4 or keys == 128):
            found += [Launch(lanes, keys, warps, stages, copies) for copies in tma]
        # With fewer warps registers spill by hundreds of bytes.
        if kernel != "keys" and lanes == 16 * warps:
            found += [Launch(lanes, keys, warps, stages, copies) for copies in tma]
    return found


def runs(T: int, block: int, kept: bool) -> tuple[dict[str, Run], float]:
    """Each kernel by a launch, on the same numbers; and what share of causal attention is computed."""
    s = setting(T, DENSITIES[0], block, "pooled")
    rows = torch.arange(0, T, KEPT_EVERY) if kept else None
    queries = Queries(choose_blocks(s.attend, s.q, s.k, SCALE), rows)
    q, k, v = s.q if rows is None else s.q[:, rows.to(DEVICE)].transpose(0, 1).contiguous().transpose(0, 1), s.k, s.v
    safe = Launch(64, 64, 4, 1)
    out, lse = block_sparse_forward(q, k, v, queries, SCALE, Launches(safe, safe, safe))
    grad = torch.randn_like(out)
    _, pairs = query_gradient(grad, q, k, v, out, lse, queries, SCALE, safe)
    return {
        "forward": lambda x: block_sparse_forward(q, k, v, queries, SCALE, Launches(x, x, x)),
        "queries": lambda x: query_gradient(grad, q, k, v, out, lse, queries, SCALE, x),
        "keys": lambda x: key_gradients(grad, q, k, v, pairs, queries, SCALE, x),
    }, s.attend.pairs(rows) / s.attend.causal_pairs


def differs(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    """Whether some number is not what the order of sums explains."""
    for x, right in zip(found, wanted, strict=True):
        x, right = x.float(), right.float()
        off, size = (x - right).norm(dim=-1), right.norm(dim=-1)
        usual = size.square().mean().sqrt()
        if not float((off / size.clamp(min=0.3 * float(usual))).amax()) <= ROW_ERROR:
            return True
        if not float(off.square().mean().sqrt()) <= ERROR * float(usual):
            return True
    return False


def compile_some(jobs: list[tuple[int, bool, str, Launch]]) -> None:
    """Leaves these kernels in Triton's cache."""
    made: dict[tuple[int, bool], dict[str, Run]] = {}
    for block, kept, kernel, launch in jobs:
        if (block, kept) not in made:
            made[block, kept] = runs(COMPILED_TOKENS, block, kept)[0]
        with suppress(OutOfResources):
            made[block, kept][kernel](launch)


@torch.no_grad()
def sweep(T: int) -> None:
    """Prints each launch's time and rate, the best of each kernel, and the backward that they add up to."""
    jobs = [
        (block, kept, kernel, launch)
        for block, kept, kernel in itertools.product(BLOCKS, (False, True), PRODUCTS)
        for launch in candidates(kernel, block)
    ]
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_some, [jobs[i::PROCESSES] for i in range(PROCESSES)]))
    for block, kept in itertools.product(BLOCKS, (False, True)):
        which = f"blocks of {block}, {'kept' if kept else 'all'} rows"
        torch.manual_seed(0)
        kernels, work = runs(T, block, kept)
        pairs = work * T * (T + 1) * H * D
        usual = launches_for(2 * D, block, torch.device(DEVICE))
        backward = 0.0
        for kernel, run in kernels.items():
            name = f"{which}, {kernel}"
            wanted, found = run(Launch(64, 64, 4, 1)), []
            for launch in candidates(kernel, block):
                try:
                    wrong = differs(run(launch), wanted)
                    ms = time_calls(lambda run=run, x=launch: run(x), DEVICE, warm_up=0, repeats=3).median_ms
                except OutOfResources:
                    continue
                rate = PRODUCTS[kernel] * pairs / (ms / 1000) / TERA
                note = "WRONG" if wrong else "in use" if launch == getattr(usual, kernel) else ""
                print(f"{name}: {shown(launch)} {ms:8.2f} ms {rate:5.0f} TFLOP/s {note}", flush=True)
                if not wrong:
                    found.append((ms, rate, launch))
            ms, rate, launch = min(found, key=lambda row: row[0])
            print(f"BEST {name}: {shown(launch)} {ms:8.2f} ms {rate:5.0f} TFLOP/s")
            backward += ms if kernel != "forward" else 0.0
        rate = 5 * pairs / (backward / 1000) / TERA
        print(f"BEST {which}, backward: {backward:.2f} ms, {rate:.0f} TFLOP/s of five products", flush=True)


def shown(launch: Launch) -> str:
    copies = " tma" if launch.tma else ""
    return f"{launch.lanes:3} lanes {launch.keys:3} keys {launch.warps} warps {launch.stages} stages{copies}"


if __name__ == "__main__":
    sweep(int(sys.argv[1]))
