"""`lemo bench quality`: every method on the same batches, judged by the dense model; one record a method and seed.

Order: output directory, data, checks; the untrained model and the step times, alone on the device; then the training
runs, `workers` at a time. After each run all rows are written anew, so that a study that was stopped goes on.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console

from lemo.bench import records
from lemo.bench.book import Book, Job
from lemo.bench.config import BASELINE, MethodConfig, QualityConfig, load_quality
from lemo.bench.records import Record
from lemo.bench.runs import Laboratory, Trained
from lemo.bench.tasks import Task, build_task
from lemo.config_io import SAVED_CONFIG, save_resolved
from lemo.errors import UserError
from lemo.models.loading import load_tokenizer
from lemo.training.checks import fingerprint_data
from lemo.training.directory import refuse_used
from lemo.training.storage import storage_errors, write_json

TASK_FILE = "task.json"


def run_study(study: QualityConfig, *, resume: bool = False) -> list[Record]:
    """Runs what the output directory doesn't hold yet.

    Args:
        study: what is compared. `study.output` must be absent or empty, unless `resume`.
        resume: go on in the directory; task, model, LoRA, training and timing must be as they were.

    Returns:
        All rows: bench `step` for the times, `quality` for the runs.

    Raises:
        UserError: anything the user can fix, before any work; or a method that doesn't fit the device.
    """
    console = Console(stderr=True)
    directory = Path(study.output)
    rows: list[Record] = []
    if resume:
        rows = open_study(study, directory)
    else:
        refuse_used(directory, "go on with the study in it")
    methods = rows_of(study)
    task = build_task(study.task, load_tokenizer(study.model.name))
    laboratory = Laboratory(study, task)
    laboratory.check(methods)
    facts = {**task.facts, "train": fingerprint_data(task.train), "heldout": fingerprint_data(task.heldout)}
    refuse_other_text(facts, directory)
    with storage_errors("the study", directory, "choose another --output"):
        directory.mkdir(parents=True, exist_ok=True)
        save_resolved(study, directory / SAVED_CONFIG)
        write_json(directory / TASK_FILE, facts)
    book = Book(study, rows, directory / records.FILE)

    timed = [m for m in methods if m.timed or m.equal_time or m.method == BASELINE]
    for method in timed if study.timed_steps else ():
        if book.time_of(method) is None:
            book.add_time(method, laboratory.time(method, study.timed_steps))
            console.print(f"timed {method.method} {method.setting}: {book.time_of(method):,.0f} ms a step")
    before = laboratory.judge_untrained()
    console.print(f"before training: held-out loss {before.loss:.4f}", highlight=False)
    jobs = [job for job in all_jobs(study, methods, book) if not book.holds(job)]
    for number, (job, trained) in enumerate(run_jobs(laboratory, jobs), start=1):
        book.add_run(job, before, trained)
        console.print(
            f"{number} of {len(jobs)}: {job.label()}: held-out loss {trained.after.loss:.4f}, keep {trained.keep:.3f}",
            highlight=False,
            soft_wrap=True,
        )
    return book.rows


def open_study(study: QualityConfig, directory: Path) -> list[Record]:
    """The rows that are there.

    Raises:
        UserError: they are of another task, model or training.
    """
    saved = records.saved_config(directory, "study")
    if saved is None:
        return []
    old = load_quality(saved)
    changed = [name for name in ("task", "model", "lora", "training") if getattr(old, name) != getattr(study, name)]
    if changed:
        raise UserError(
            f"--resume: {', '.join(changed)} differ from those of the study in {directory} ({saved.name}), so its rows "
            "can't be compared with new ones; choose another --output"
        )
    # A row whose knobs changed under the same name would pass for the old one.
    before = {(m.method, m.setting): m for m in old.methods}
    for method in study.methods:
        was = before.get((method.method, method.setting), method)
        if (was.sparsity, was.keep, was.learning_rate) != (method.sparsity, method.keep, method.learning_rate):
            raise UserError(
                f"--resume: {method.method} with setting {method.setting!r} has other knobs than in {directory}; give "
                "the new row another setting"
            )
    return records.read_saved(directory)


def refuse_other_text(facts: dict[str, Any], directory: Path) -> None:
    """Refuses to mix rows trained on different texts (another Python's library, for one).

    Raises:
        UserError: the directory's study had other training or held-out sequences.
    """
    path = directory / TASK_FILE
    if not path.is_file():
        return
    old = json.loads(path.read_text(encoding="utf-8"))
    if any(old.get(key) != facts[key] for key in ("train", "heldout")):
        raise UserError(
            f"--resume: the text of task.sources isn't what it was when {directory} was begun (another Python or "
            "package version?), so rows can't be compared; choose another --output"
        )


def rows_of(study: QualityConfig) -> tuple[MethodConfig, ...]:
    """The baseline, which needs no mention, and the study's methods."""
    baseline = MethodConfig(method=BASELINE)
    return (baseline, *(m for m in study.methods if (m.method, m.setting) != (BASELINE, baseline.setting)))


def all_jobs(study: QualityConfig, methods: tuple[MethodConfig, ...], book: Book) -> list[Job]:
    """Every training run of the study, the baseline's first."""
    jobs = []
    for method in methods:
        for seed in study.seeds[: method.seeds]:
            jobs.append(Job(method, seed, study.training.steps))
            if method.equal_time and method.method != BASELINE:
                steps = book.steps_in_equal_time(method)
                jobs.append(Job(method, seed, steps, equal_time=True))
    return jobs


# ---- Processes ----

_laboratory: Laboratory | None = None


def _open(study: QualityConfig, folder: str) -> None:
    global _laboratory
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // study.workers))
    train, heldout = (Dataset.load_from_disk(f"{folder}/{part}") for part in ("train", "heldout"))
    _laboratory = Laboratory(study, Task(study.task, train, heldout, {}))


def _train(job: Job) -> Trained:
    assert _laboratory is not None, "the pool opens it"
    return _laboratory.train(job.method, job.seed, job.steps)


def run_jobs(laboratory: Laboratory, jobs: list[Job]) -> Iterator[tuple[Job, Trained]]:
    """Runs jobs, `study.workers` at a time, and yields each as it ends."""
    study, task = laboratory.study, laboratory.task
    if study.workers == 1:
        for job in jobs:
            yield job, laboratory.train(job.method, job.seed, job.steps)
        return
    # CUDA can't be forked. The data go by way of the disk: a new process reads its arguments only after its imports,
    # and those of the next would have to wait.
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        task.train.save_to_disk(f"{folder}/train")
        task.heldout.save_to_disk(f"{folder}/heldout")
        pool = ProcessPoolExecutor(min(study.workers, max(1, len(jobs))), context, _open, (study, folder))
        try:
            waiting: dict[Future[Trained], Job] = {pool.submit(_train, job): job for job in jobs}
            while waiting:
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    job = waiting.pop(future)
                    try:
                        yield job, future.result()
                    except BrokenProcessPool as error:
                        raise UserError(
                            f"a process died while {job.label()} ran (killed for memory?); finished runs are kept: "
                            "lower workers and go on with --resume"
                        ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
