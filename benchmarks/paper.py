"""The paper's numbers beside ours: what both measured, by shape and length, and where they differ.

The paper is arXiv 2501.09767 (JENGA at USENIX ATC 2025); its memory and times are its authors' logs. Nothing is read
off its figures.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.speed import FORWARD, OUT, step_records, table
from lemo.bench.records import Record, read
from lemo.report.ops import OpLine, op_lines

HALF = "keep 0.5"
NAMES = {"llama-2-7b": "Llama-2-7B", "llama-3-8b": "Llama-3-8B", "opt-1.3b": "OPT-1.3B", "opt-350m": "OPT-350M"}
# (LoRA, JENGA, how many times less), GB of 1,000 MiB, reserved, on an A800 80GB; None where memory ran out.
MEMORY: dict[tuple[str, int], tuple[float | None, float, float | None]] = {
    ("llama-2-7b", 4096): (43.0, 28.8, 1.50),
    ("llama-2-7b", 8192): (73.1, 44.5, 1.64),
    ("llama-3-8b", 4096): (48.3, 31.0, 1.56),
    ("llama-3-8b", 8192): (79.0, 43.5, 1.82),
    ("opt-1.3b", 16384): (44.6, 28.1, 1.59),
    ("opt-1.3b", 32768): (None, 53.7, None),
    ("opt-350m", 32768): (52.0, 27.9, 1.86),
    ("opt-350m", 65536): (None, 55.0, None),
}
GB = 1000 / 1024
# LoRA and JENGA, ms a step with gradient checkpointing on the same card, by length.
STEP: dict[str, dict[int, tuple[float, float]]] = {
    "llama-2-7b": {
        4096: (1241, 1143),
        8192: (2656, 2371),
        16384: (6057, 5140),
        32768: (15410, 12170),
        49152: (28243, 21198),
        65536: (44587, 32242),
    },
    "llama-3-8b": {32768: (15851, 12970)},
}
# LoRA and JENGA on PG19, Llama-2-7B, 8,192 tokens, both evaluated dense.
PERPLEXITY = (6.951, 7.114)
NAIVE = (10, 50)
MOVEMENTS = ("movement: read, norm, add", "movement: backward")
_NONE = "not measured"


@dataclass(frozen=True)
class Pair:
    """Steps of ordinary LoRA and of mode `forward` with half of the blocks kept, at one shape and length."""

    lora: Record
    half: Record

    @property
    def speed_up(self) -> float | None:
        ours, theirs = self.half.step_ms, self.lora.step_ms
        return theirs / ours if ours and theirs else None

    @property
    def layers(self) -> int:
        return int((self.half.details or {})["layers"])

    @property
    def all_layers(self) -> bool:
        return self.layers == (self.half.details or {})["full_depth"]


def pairs(results: Path, *, checkpointed: bool = False) -> dict[tuple[str, int], Pair]:
    """What was measured of both, by shape and length; the deepest model of each."""
    suffix = "+ckpt" if checkpointed else ""
    found: dict[tuple[str, int], Pair] = {}
    records = [record for marker in FORWARD for record in step_records(results, marker)]
    for lora in records:
        for half in records:
            same = _place(lora) == _place(half) and lora.method == f"lora{suffix}"
            if not same or (half.method, half.setting) != (f"lemo-forward{suffix}", HALF):
                continue
            pair, key = Pair(lora, half), (str(half.shape), int(half.T or 0))
            if key not in found or pair.layers > found[key].layers:
                found[key] = pair
    return found


def _place(record: Record) -> tuple[object, ...]:
    return record.gpu, record.shape, (record.details or {}).get("layers"), record.T


def movements(results: Path) -> list[OpLine]:
    """The kernels' rows of `MOVEMENTS`, beside the naive way."""
    lines = op_lines(_named(results, "ops"))
    return [line for line in lines if line.details.op in MOVEMENTS and line.details.implementation == "kernels"]


def losses(results: Path, implementation: str) -> list[OpLine]:
    """The loss's rows of `logits`, all at once, or `lemo`, in segments."""
    lines = op_lines(_named(results, "ops"))
    return [line for line in lines if (line.details.op, line.details.implementation) == ("loss", implementation)]


def _named(results: Path, name: str) -> list[Record]:
    return [record for path in sorted(results.glob(f"*/*_{name}.jsonl")) for record in read(path)]


def cards(records: Iterable[Record]) -> str:
    """What measured them, in short: `H100`."""
    return " and ".join(dict.fromkeys(record.gpu.removeprefix("NVIDIA ").split()[0] for record in records))


def paper_table(results: Path) -> str:
    """Markdown: what | the paper's | ours | what differs; empty without any step of ours."""
    if not pairs(results):
        return ""
    parts = (_memory, _times, _kernels, _predictors, _perplexities)
    rows = [row for part in parts for row in part(results)]
    return table(("what", "the paper, A800 80GB", f"ours, {_gpus(results)}", "what differs"), rows)


def _gpus(results: Path) -> str:
    return " and ".join(dict.fromkeys(pair.half.gpu for pair in pairs(results).values()))


def _memory(results: Path) -> Iterator[Sequence[str]]:
    found = pairs(results)
    for (shape, T), (lora, jenga, ratio) in MEMORY.items():
        theirs = f"{_gb(lora)} → {_gb(jenga)}" + (f", ×{ratio:.2f}" if ratio else "")
        yield (
            f"{NAMES[shape]}, {T:,} tokens: memory, LoRA → tokens left out",
            theirs,
            _memory_of(found.get((shape, T))),
            "theirs segments the loss only where tokens are left out",
        )
    for T, claim in ((4096, 0.382), (8192, 0.505)):
        ratios = [_reserved_ratio(pair) for (_, length), pair in found.items() if length == T]
        saved = [1 - 1 / ratio for ratio in ratios if ratio]
        ours = f"{statistics.mean(saved):.1%}" if saved else _NONE
        yield (
            f"memory saved at {T:,} tokens, mean",
            f"{claim:.1%}",
            ours,
            "theirs over all their models, ours over the shapes above",
        )


def _memory_of(pair: Pair | None) -> str:
    if pair is None:
        return _NONE
    lora, half = pair.lora.peak_reserved_gib, pair.half.peak_reserved_gib
    ratio = _reserved_ratio(pair)
    return f"{_gib(lora)} → {_gib(half)}" + (f", ×{ratio:.2f}" if ratio else "")


def _reserved_ratio(pair: Pair) -> float | None:
    lora, half = pair.lora.peak_reserved_gib, pair.half.peak_reserved_gib
    return lora / half if lora and half else None


def _times(results: Path) -> Iterator[Sequence[str]]:
    plain, checkpointed = pairs(results), pairs(results, checkpointed=True)
    for shape, times in STEP.items():
        for T, (lora, jenga) in times.items():
            differs, pair = "", checkpointed.get((shape, T))
            if pair is None:
                pair = plain.get((shape, T))
                differs = "theirs with gradient checkpointing, ours without"
            if pair is None:
                pair = checkpointed.get(("llama-3-8b", T))
                differs = f"ours {NAMES['llama-3-8b']}'s shape"
            if pair is None:
                differs = ""
            elif not pair.all_layers:
                differs += f"{', ' if differs else ''}{pair.layers} layers"
            what = f"{NAMES[shape]}, {T:,} tokens: a step, LoRA → tokens left out"
            yield what, f"{lora:,.0f} → {jenga:,.0f} ms, ×{lora / jenga:.2f}", _time_of(pair), differs


def _time_of(pair: Pair | None) -> str:
    if pair is None:
        return _NONE
    up = f", ×{pair.speed_up:.2f}" if pair.speed_up else ""
    lora, half = (OUT if row.step_ms is None else f"{row.step_ms:,.0f}" for row in (pair.lora, pair.half))
    return f"{lora} → {half} ms{up}"


def _kernels(results: Path) -> Iterator[Sequence[str]]:
    claim = f"×{NAIVE[0]} to ×{NAIVE[1]}"
    for keep in (0.5, 0.25):
        lines = [line for line in movements(results) if line.row.keep == keep]
        ours, by_bytes = (_range(getattr(line, key) for line in lines) for key in ("speed_up", "by_bytes"))
        what = f"rows moved in place over the naive way, {keep:g} kept, forward and backward"
        yield what, claim, ours, f"what naive is; by bytes ours can give {by_bytes}"
    logits, segments = (
        {line.row.T or 0: line.details.above_gib for line in losses(results, by) if line.details.above_gib is not None}
        for by in ("logits", "lemo")
    )
    T = max(logits.keys() & segments.keys(), default=0)
    ours = f"{logits[T]:.1f} → {segments[T]:.2f} GiB of the loss, {T:,} tokens" if T else _NONE
    yield "memory that the segmented loss saves", "a further 15%", ours, "theirs of a step, ours of the loss alone"


def _range(values: Iterable[float | None]) -> str:
    known = [value for value in values if value]
    return f"×{min(known):.1f} to ×{max(known):.1f}" if known else _NONE


def _predictors(results: Path) -> Iterator[Sequence[str]]:
    rows = [row for row in _named(results, "calibration-4k") if (row.details or {}).get("size_share") is not None]
    if rows:
        found = [row.recall for row in rows if row.recall is not None]
        shares = [float((row.details or {})["size_share"]) for row in rows]
        differs = "ours SmolLM2-135M, held-out documents of 4,096 tokens"
        yield "predictors' recall", "95.13%", f"{statistics.mean(found):.1%}", differs
        yield "predictors' parameters left by pruning", "64.6%", f"{statistics.mean(shares):.1%}", "as above"


def _perplexities(results: Path) -> Iterator[Sequence[str]]:
    settings = {
        "half kept, no calibration": ("quality-lm", HALF),
        "three quarters kept, calibrated": ("forward-lm", "curves, both, 0.75"),
        "the same, half of the passes dense": ("forward-lm", "curves, both, 0.75: half dense first, bypasses train"),
        "nine tenths kept, calibrated": ("forward-lm", "curves, both, 0.9"),
    }
    for words, (name, setting) in settings.items():
        rows = _named(results, name)
        dense, sparse = (_loss(rows, *key) for key in (("lora+ckpt", "default"), ("lemo-forward", setting)))
        ours = _NONE if dense is None or sparse is None else f"{math.exp(sparse - dense) - 1:+,.1%}"
        theirs = f"{PERPLEXITY[1] / PERPLEXITY[0] - 1:+.1%}"
        differs = f"ours SmolLM2-135M on code, {words}"
        yield "perplexity against LoRA's, 8,192 tokens, evaluated dense", theirs, ours, differs


def _loss(rows: Iterable[Record], method: str, setting: str) -> float | None:
    found = [r.loss_after for r in rows if (r.method, r.setting) == (method, setting) and r.loss_after is not None]
    return statistics.mean(found) if found else None


def _gb(value: float | None) -> str:
    return OUT if value is None else f"{value:.1f} GB"


def _gib(value: float | None) -> str:
    return OUT if value is None else f"{value:.1f} GiB"


def speed_ups(times: Mapping[int, tuple[float, float]]) -> list[tuple[int, float]]:
    """The paper's, by length."""
    return [(T, lora / jenga) for T, (lora, jenga) in times.items()]
