"""`lemo bench ops`: each operation by our kernel, its twin and what others do, beside its floor; one record a row.

The floor is what the bytes it must move take at the bandwidth of a large copy, or its operations at the rate of a large
matrix product, both measured on the device first. Memory that runs out is a row without a time. After each row all
rows are written anew, so that a benchmark that was stopped goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lemo.bench import records
from lemo.bench.cost import TERA, matmul_ceiling
from lemo.bench.op import Op
from lemo.bench.op_loss import check_codes, loss_ops
from lemo.bench.op_movement import movement_ops
from lemo.bench.ops_config import OpsConfig, load_ops
from lemo.bench.records import Record
from lemo.bench.timing import Timed, copy_bandwidth, free_memory, time_calls
from lemo.config_io import SAVED_CONFIG, save_resolved
from lemo.errors import UserError
from lemo.memory.tracker import GIB
from lemo.models.device import choose_device
from lemo.training.directory import refuse_used
from lemo.training.storage import storage_errors
from lemo.training.summary import versions

REPEATS = 5


def run_ops(config: OpsConfig, *, resume: bool = False) -> list[Record]:
    """Measures what the output directory doesn't hold yet.

    Args:
        config: what is measured. `config.output` must be absent or empty, unless `resume`.
        resume: go on in the directory; `dtype`, `warm_up` and `repeats` must be as they were.

    Returns:
        All rows.

    Raises:
        UserError: anything the user can fix, before any work.
    """
    console = Console(stderr=True)
    directory, device = Path(config.output), choose_device(config.device)
    if config.loss is not None:
        check_codes(config.loss, device)
    rows: list[Record] = []
    if resume:
        rows = _rows_there(config, directory)
    else:
        refuse_used(directory, "go on with the benchmark in it")
    with storage_errors("the benchmark", directory, "choose another --output"):
        directory.mkdir(parents=True, exist_ok=True)
        save_resolved(config, directory / SAVED_CONFIG)
    bandwidth, ceiling = copy_bandwidth(device), matmul_ceiling(device, getattr(torch, config.dtype))
    for op in all_ops(config, device):
        if _holds(rows, op):
            continue
        row = _record(config, op, _measure(config, op, device), bandwidth, ceiling)
        rows.append(row)
        records.write(rows, directory / records.FILE)
        told = "out of memory" if row.step_ms is None else f"{row.step_ms:,.3f} ms"
        kept = "" if op.keep is None else f", {op.keep:.2f} kept"
        console.print(f"{op.op}, {op.T:,} tokens{kept}: {op.implementation} {told}", highlight=False, soft_wrap=True)
    return rows


def all_ops(config: OpsConfig, device: str) -> Iterator[Op]:
    """Everything that is asked for and runs on the device."""
    dtype = getattr(torch, config.dtype)
    if config.movement is not None:
        yield from movement_ops(config.movement, dtype, device)
    if config.loss is not None:
        yield from loss_ops(config.loss, dtype, device)


def op_row(setting: str, method: str, shape: str, T: int, run: Callable[[], object], device: str) -> Record:
    """A record of one call that is in no configuration, for scripts; printed too.

    Args:
        setting: what was called, in words.
        method: the method it belongs to.
        shape: name of the shape.
        T: tokens.
        run: the call.
        device: where it runs.
    """
    timed = time_calls(run, device, warm_up=1, repeats=REPEATS)
    row = op_record(timed, method=method, shape=shape, T=T, setting=setting, steps=REPEATS)
    row.details = {"above_what_was_held_gib": timed.above_gib}
    print(f"{setting}, {T} tokens: {row.step_ms:.2f} ms, peak {row.peak_gib:.2f} GiB", flush=True)
    return row


def _rows_there(config: OpsConfig, directory: Path) -> list[Record]:
    saved = records.saved_config(directory, "benchmark")
    if saved is None:
        return []
    old = load_ops(saved)
    changed = [name for name in ("dtype", "warm_up", "repeats") if getattr(old, name) != getattr(config, name)]
    if changed:
        raise UserError(
            f"--resume: {', '.join(changed)} differ from the benchmark in {directory} ({saved.name}), so its rows "
            "can't be compared with new ones; choose another --output"
        )
    return records.read_saved(directory)


def _holds(rows: list[Record], op: Op) -> bool:
    wanted = (op.op, op.implementation, op.shape, op.T, op.keep, records.device_name())
    return any(
        ((r.details or {}).get("op"), (r.details or {}).get("implementation"), r.shape, r.T, r.keep, r.gpu) == wanted
        for r in rows
    )


def _measure(config: OpsConfig, op: Op, device: str) -> Timed | None:
    """None where it doesn't fit the device's memory."""
    run: Any = None
    try:
        run = op.prepare()
        return time_calls(run, device, warm_up=config.warm_up, repeats=config.repeats)
    except torch.OutOfMemoryError:
        return None
    finally:
        del run
        free_memory(device)


def _record(config: OpsConfig, op: Op, timed: Timed | None, bandwidth: float | None, ceiling: float | None) -> Record:
    """A row.

    `details`: `op` and `implementation`; `gigabytes` and `tflop` it needs at least; `floor_ms`, what they take at
    `copy_gb_per_s` and `ceiling_tflop_per_s`; `above_gib`, the peak beyond its inputs and what every implementation
    must return; `out_of_memory`.
    """
    row = op_record(
        timed, method=op.method, shape=op.shape, T=op.T, keep=op.keep,
        setting=f"{op.op}: {op.implementation}", steps=config.repeats,
    )  # fmt: skip
    row.commit = config.commit or row.commit
    seconds = 0.0
    if bandwidth and ceiling:
        seconds = max(op.bytes / bandwidth, op.flop / ceiling)
    above = None if timed is None or timed.above_gib is None else timed.above_gib - op.handed_out / GIB
    row.details = {
        "op": op.op,
        "implementation": op.implementation,
        "gigabytes": op.bytes / 1e9,
        "tflop": op.flop / TERA,
        "floor_ms": 1000 * seconds or None,
        "copy_gb_per_s": bandwidth and bandwidth / 1e9,
        "ceiling_tflop_per_s": ceiling and ceiling / TERA,
        "above_gib": above,
        "out_of_memory": timed is None,
    }
    return row


def op_record(timed: Timed | None, **values: Any) -> Record:
    """A row of one operation.

    Args:
        timed: None where it didn't fit.
        values: of the record.
    """
    row = Record(bench="op", batch=1, versions=versions(), **values)
    if timed is not None:
        row.step_ms, row.step_ms_min, row.step_ms_max = timed.median_ms, min(timed.ms), max(timed.ms)
        row.peak_gib = timed.peak_gib
        row.tokens_per_s = 1000 * row.T / timed.median_ms if row.T else None
    return row
