"""The command line: arguments in, exit code out. Everything else is imported when it is needed."""

import functools
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, ParamSpec

import typer

import fastsafe
from fastsafe.errors import FastsafeError, UsageError

if TYPE_CHECKING:
    from fastsafe.audit.plan import Plan
    from fastsafe.audit.run import Run

P = ParamSpec("P")

EXIT_ERROR, EXIT_COVERAGE, EXIT_INTERRUPTED = 1, 3, 130

app = typer.Typer(
    name="fastsafe",
    help="Measure, per task format, what fine-tuning does to a model's safety, and repair it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
organism_app = typer.Typer(help="The tiny model that ships with fastsafe.", no_args_is_help=True)
app.add_typer(organism_app, name="organism")


class Device(StrEnum):
    """Where a model runs."""

    CPU = "cpu"
    CUDA = "cuda"


class Listed(StrEnum):
    """What ``fastsafe list`` can list."""

    TASKS = "tasks"
    FORMATS = "formats"
    JUDGES = "judges"
    MITIGATIONS = "mitigations"
    MODELS = "models"
    RECIPES = "recipes"


Debug = Annotated[
    bool, typer.Option("--debug", envvar="FASTSAFE_DEBUG", help="Show tracebacks of errors.")
]
AsJson = Annotated[
    bool, typer.Option("--json", envvar="FASTSAFE_JSON", help="Print JSON for machines.")
]
ShowCompletions = Annotated[
    bool,
    typer.Option(
        "--show-completions",
        envvar="FASTSAFE_SHOW_COMPLETIONS",
        help="Quote prompts and completions in report.html instead of redacting them.",
    ),
]


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGTERM, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a terminal that cannot show an arrow must not end a run
            stream.reconfigure(errors="replace")
    app()


def explained(command: Callable[P, None]) -> Callable[P, None]:
    """Turn errors of a command into one sentence on stderr and the exit code of their kind."""

    @functools.wraps(command)
    def run(*args: P.args, **options: P.kwargs) -> None:
        try:
            command(*args, **options)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            _fail("interrupted; run the same command to resume", EXIT_INTERRUPTED)
        except Exception as error:
            if options.get("debug"):
                raise
            message = " ".join(str(error).split())
            if isinstance(error, FastsafeError):
                _fail(f"error: {message}", error.exit_code)
            if isinstance(error, OSError) and error.filename is not None:
                _fail(f"error: {error.filename}: {error.strerror}", EXIT_ERROR)
            kind = type(error).__name__
            _fail(f"error: {kind}: {message}; run again with --debug for the traceback", EXIT_ERROR)

    return run


def _fail(message: str, exit_code: int) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(exit_code)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"fastsafe {fastsafe.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Measure, per task format, what fine-tuning does to a model's safety, and repair it."""


@app.command()
@explained
def audit(
    recipe: Annotated[
        str,
        typer.Argument(
            envvar="FASTSAFE_RECIPE",
            help="Name of a shipped recipe (see 'fastsafe list recipes') or path of a YAML file.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            envvar="FASTSAFE_MODEL",
            help="Checkpoint folder, hub id or 'organism', instead of the recipe's.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(envvar="FASTSAFE_OUT", help="Run directory [default: runs/RECIPE]."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="A.B=C",
            help="Override a key of the recipe [env var: FASTSAFE_SET, parted by ';'].",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, envvar="FASTSAFE_LIMIT", help="Most behaviours per cell and rows per task."
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, envvar="FASTSAFE_SEED", help="Of training, mixing and sampling."),
    ] = None,
    device: Annotated[
        Device, typer.Option(envvar="FASTSAFE_DEVICE", help="Where the model runs.")
    ] = Device.CPU,
    batch_size: Annotated[
        str,
        typer.Option(
            envvar="FASTSAFE_BATCH_SIZE",
            metavar="auto|N",
            help="Most prompts that are computed together.",
        ),
    ] = "auto",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", envvar="FASTSAFE_DRY_RUN", help="Print the plan, write nothing."),
    ] = False,
    no_resume: Annotated[
        bool,
        typer.Option(
            "--no-resume", envvar="FASTSAFE_NO_RESUME", help="Delete the run there and start over."
        ),
    ] = False,
    as_json: AsJson = False,
    show_completions: ShowCompletions = False,
    debug: Debug = False,
) -> None:
    """Fine-tune, probe, judge and report; run again to resume.

    Exit codes: 0 done, 1 error, 2 usage, 3 too few answers could be judged, 130 interrupted.
    """
    from fastsafe.audit import progress, run

    plan, runtime = run.prepare(
        recipe,
        model=model,
        overrides=overrides or _settings(os.environ.get("FASTSAFE_SET", "")),
        limit=limit,
        seed=seed,
        device=device.value,
        batch_size=_batch_size(batch_size),
    )
    if dry_run:
        _print_plan(plan, as_json)
        return
    done = run.execute(
        plan,
        runtime,
        out or run.default_out(plan.recipe),
        resume=not no_resume,
        show_completions=show_completions,
        progress=progress.for_terminal(as_json=as_json),
    )
    _finish(done, as_json)


@app.command()
@explained
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    as_json: AsJson = False,
    show_completions: ShowCompletions = False,
    debug: Debug = False,
) -> None:
    """Report a run again, finished or not, from its store."""
    from fastsafe.audit import manifest, run

    done = run.report(run_dir, show_completions=show_completions)
    if as_json:
        typer.echo(manifest.to_json(done.results), nl=False)
    _finish(done, as_json, how_to_finish="finish it by fastsafe audit")


@app.command("list")
@explained
def list_parts(
    what: Annotated[Listed, typer.Argument(help="What to list.")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List what a recipe can name."""
    import json

    from fastsafe.audit import catalogue

    found = catalogue.entries(what.value)
    if as_json:
        typer.echo(json.dumps([{"id": name, "about": about} for name, about in found.items()]))
        return
    width = max(map(len, found))
    for name, about in found.items():
        typer.echo(f"{name:<{width}}  {about}".rstrip())


@app.command()
@explained
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder or hub id, or 'organism'.")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what a checkpoint holds, running nothing of it."""
    import json

    from fastsafe.audit import catalogue

    facts = catalogue.inspect(checkpoint)
    if as_json:
        typer.echo(json.dumps(facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        typer.echo(f"{name.replace('_', ' '):<{width}}  {_shown(value)}")


@organism_app.command("path")
@explained
def organism_path(debug: Debug = False) -> None:
    """Print where the shipped checkpoint lies."""
    typer.echo(str(fastsafe.organism.path()))


@organism_app.command("build")
@explained
def organism_build(
    out: Annotated[
        Path, typer.Option(envvar="FASTSAFE_OUT", help="Folder of the checkpoint, a new one.")
    ] = Path("organism"),
    seed: Annotated[int, typer.Option(min=0, envvar="FASTSAFE_SEED")] = fastsafe.organism.SEED,
    debug: Debug = False,
) -> None:
    """Train the organism from nothing: minutes on two cores."""
    from fastsafe.audit import progress

    if out.exists():
        raise UsageError(f"organism build: {out} exists, expected a new folder; use another --out")
    with progress.following(progress.for_terminal()) as after_step:
        fastsafe.organism.build(out, seed=seed, on_progress=after_step)
    typer.echo(str(out))


def _interrupt(signum: int, frame: object) -> NoReturn:
    """Let SIGTERM end a run as Ctrl-C does: what is done is kept."""
    raise KeyboardInterrupt


def _settings(text: str) -> list[str]:
    """Part the settings of an environment variable; their values may hold spaces."""
    return [part.strip() for part in re.split(r"[\n;]", text) if part.strip()]


def _batch_size(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if text.isascii() and text.isdecimal() and int(text) >= 1:
        return int(text)
    raise UsageError(f"--batch-size: it is {text!r}, expected 'auto' or a number from 1")


def _finish(
    run: "Run", as_json: bool, how_to_finish: str = "run the same command to finish"
) -> None:
    if not as_json:
        from rich.console import Console

        from fastsafe.audit.report import tables

        console = Console(highlight=False)
        for part in tables(run.results, console.width):
            console.print(part)
        console.print(f"\nreport: {run.path / 'report.html'}", soft_wrap=True, markup=False)
    if not run.is_covered:
        covered, wanted = (run.results["run"][k] for k in ("coverage", "coverage_threshold"))
        _fail(
            f"error: run {run.path}: coverage is {covered:.3f} in the least covered cell, "
            f"expected {wanted:.3f}; {how_to_finish}, or lower thresholds.coverage",
            EXIT_COVERAGE,
        )


def _print_plan(plan: "Plan", as_json: bool) -> None:
    import json

    from fastsafe.audit import catalogue

    facts = catalogue.describe(plan)
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        typer.echo(f"{name.replace('_', ' '):<17}  {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    main()
