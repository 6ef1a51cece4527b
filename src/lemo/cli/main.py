"""`lemo finetune | calibrate | eval | bench | report`.

Rooms that need torch are imported after the configuration has been read.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from lemo.config_io import load_config
from lemo.errors import UserError

USER_ERROR = 2
INTERRUPTED = 130

app = typer.Typer(
    help="Long-context fine-tuning that leaves out the token blocks that don't matter.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Config = Annotated[Path | None, typer.Option("--config", help="YAML file laid over the defaults.")]
Data = Annotated[str | None, typer.Option("--data", help="Folder, file or glob of text, code or JSONL; or `stdlib`.")]
Model = Annotated[str | None, typer.Option("--model", help="Local directory or Hugging Face hub name.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="A setting, as in sparsity.fidelity=0.9; may be repeated.")
]
Output = Annotated[str | None, typer.Option("--output", help="Directory; must be absent or empty.")]
Missing = Annotated[bool, typer.Option("--resume", help="Measure what the benchmark in --output lacks.")]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, all else on stderr.")]


@app.command()
def finetune(
    config: Config = None,
    data: Data = None,
    model: Model = None,
    output: Annotated[str | None, typer.Option("--output", help="Run directory; must be absent or empty.")] = None,
    overrides: Set = None,
    device: Device = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --output.")] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a model with LoRA. Without --config and --data it runs the built-in example."""
    settings = load_config(
        config, data=data, model=model, output=output, device=device, overrides=overrides or [], resume=resume
    )
    with _work(as_json):
        try:
            from lemo import training

            summary = training.finetune(settings, resume=resume)
            report = _report(Path(settings.output)) if training.is_main_process() else None
        except KeyboardInterrupt:
            from lemo.training.checkpoints import resume_hint

            raise _InterruptedError(resume_hint(settings.output)) from None
    _print(as_json, summary.to_dict(), [summary.headline(), f"adapter: {settings.output}/adapter", f"report: {report}"])


@app.command()
def calibrate(
    config: Config = None,
    data: Data = None,
    model: Model = None,
    output: Output = None,
    overrides: Set = None,
    device: Device = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the calibration in --output.")] = False,
    as_json: Json = False,
) -> None:
    """Make what mode forward needs: predictors, thresholds and bypasses, from a model and a sample of your data."""
    from lemo.calibration.config import load_calibration

    settings = load_calibration(config, data=data, model=model, output=output, device=device, overrides=overrides or [])
    with _work(as_json):
        from lemo.calibration.job import calibrate as run_calibration

        with _kept(settings.output, "what was measured is"):
            facts = run_calibration(settings, resume=resume).facts
        path = _report(Path(settings.output))
    _print(
        as_json,
        facts.model_dump(mode="json"),
        [
            facts.headline(),
            f"use it: --set sparsity.mode=forward --set sparsity.calibration={settings.output}",
            f"report: {path}",
        ],
    )


@app.command("eval")
def evaluate(
    config: Config = None,
    data: Data = None,
    model: Model = None,
    adapter: Annotated[Path | None, typer.Option("--adapter", help="Directory of a PEFT adapter.")] = None,
    output: Annotated[Path | None, typer.Option("--output", help="JSON file for the result; must be absent.")] = None,
    overrides: Set = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Held-out loss and perplexity of the dense model, overall and by position.

    The held-out documents are those that `lemo finetune` with the same settings holds out; to evaluate all documents
    of another place, give --set data.heldout=PLACE.
    """
    settings = load_config(config, data=data, model=model, device=device, overrides=overrides or [])
    if output is not None and output.exists():
        raise UserError(f"--output {output} exists, and nothing is overwritten; choose another --output")
    with _work(as_json):
        from lemo.evaluation.job import evaluate_model

        result = evaluate_model(settings, adapter)
    if output is not None:
        from lemo.training.storage import write_json

        write_json(output, result.to_dict())
    _print(as_json, result.to_dict(), result.lines())


bench = typer.Typer(help="Measure what leaving tokens out does.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command("quality")
def bench_quality(
    config: Annotated[Path, typer.Option("--config", help="YAML file: a task and the methods compared on it.")],
    model: Model = None,
    output: Output = None,
    overrides: Set = None,
    device: Device = None,
    resume: Annotated[bool, typer.Option("--resume", help="Run what the study in --output lacks.")] = False,
    as_json: Json = False,
) -> None:
    """Train ordinary LoRA and other methods on the same batches; judge each with the dense model."""
    from lemo.bench.config import load_quality

    study = load_quality(config, model=model, output=output, device=device, overrides=overrides or [])

    def measure() -> list[Any]:
        from lemo.bench.quality import run_study

        return run_study(study, resume=resume)

    _benchmark(measure, study.output, as_json)


@bench.command("step")
def bench_step(
    config: Annotated[Path, typer.Option("--config", help="YAML file: shapes, lengths and methods.")],
    output: Output = None,
    overrides: Set = None,
    device: Device = None,
    resume: Missing = False,
    as_json: Json = False,
) -> None:
    """Time and memory of a training step by method, model shape (random weights) and length."""
    from lemo.bench.step_config import load_step

    settings = load_step(config, output=output, device=device, overrides=overrides or [])

    def measure() -> list[Any]:
        from lemo.bench.step import run_steps

        return run_steps(settings, resume=resume)

    _benchmark(measure, settings.output, as_json)


@bench.command("ops")
def bench_ops(
    config: Annotated[Path, typer.Option("--config", help="YAML file: operations and sizes.")],
    output: Output = None,
    overrides: Set = None,
    device: Device = None,
    resume: Missing = False,
    as_json: Json = False,
) -> None:
    """Time and memory of single operations: our kernels, their plain twins, the naive way and other libraries."""
    from lemo.bench.ops_config import load_ops

    settings = load_ops(config, output=output, device=device, overrides=overrides or [])

    def measure() -> list[Any]:
        from lemo.bench.ops import run_ops

        return run_ops(settings, resume=resume)

    _benchmark(measure, settings.output, as_json)


@app.command()
def report(
    source: Annotated[Path, typer.Argument(help="Run directory, or benchmark records: a directory or JSONL file.")],
    as_json: Json = False,
) -> None:
    """Write report.html anew: of a run of `lemo finetune`, or of benchmark records."""
    with _work(as_json):
        path = _report(source)
    _print(as_json, {"report": str(path)}, [f"report: {path}"])


def _report(source: Path) -> Path:
    from lemo import report as reports

    if reports.holds_calibration(source):
        return reports.build_calibration(source)
    return reports.build_records(source) if reports.holds_records(source) else reports.build(source)


def _work(as_json: bool) -> contextlib.AbstractContextManager[Any]:
    """With --json, whatever a library prints goes to stderr."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


def _print(as_json: bool, value: dict[str, Any], lines: list[str]) -> None:
    print(json.dumps(value, ensure_ascii=False, allow_nan=False) if as_json else "\n".join(lines))


def _benchmark(measure: Callable[[], list[Any]], output: str, as_json: bool) -> None:
    """A benchmark's rows, then their report.

    Args:
        measure: measures what `output` lacks, with --resume, and returns all rows; imports what it needs itself.
        output: the benchmark's directory.
        as_json: --json.
    """
    with _work(as_json):
        with _kept(output, "finished rows are"):
            count = len(measure())
        path = _report(Path(output))
    _print(as_json, {"records": count, "report": str(path)}, [f"{count} records", f"report: {path}"])


class _InterruptedError(Exception):
    """Ctrl-C during a run; the message says how to go on."""


@contextlib.contextmanager
def _kept(output: str, what: str) -> Iterator[None]:
    """Ctrl-C inside leaves what is done behind, and says so."""
    try:
        yield
    except KeyboardInterrupt:
        raise _InterruptedError(f"stopped; {what} in {output}: go on with --resume --output {output}") from None


def run() -> None:
    """The entry point: a mistake of the user's is one line on stderr and exit status 2, never a traceback."""
    # Deprecations between transformers and PEFT aren't the user's to mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    # typer's own base of its usage errors, which it doesn't export.
    usage_error: Any = typer.BadParameter.__bases__[0]
    try:
        status = app(standalone_mode=False)
    except UserError as error:
        _stop(f"error: {error}", USER_ERROR)
    except usage_error as error:
        _stop(f"error: {error.format_message()} (see lemo --help)", USER_ERROR)
    except _InterruptedError as stop:
        _stop(str(stop), INTERRUPTED)
    except (KeyboardInterrupt, typer.Abort):
        _stop("interrupted", INTERRUPTED)
    sys.exit(status if isinstance(status, int) else 0)


def _stop(message: str, status: int) -> None:
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(status)
