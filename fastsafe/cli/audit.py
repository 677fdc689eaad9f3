"""``fastsafe audit``, ``judge`` and ``report``: a whole run, its judges and its report again."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastsafe.cli.options import (
    EXIT_COVERAGE,
    AsJson,
    BatchSize,
    Computes,
    Debug,
    Device,
    ShowCompletions,
    batch_size_of,
    fail,
    parted,
    show,
)

if TYPE_CHECKING:
    from fastsafe.audit.run import Run

Where = Annotated[Device, typer.Option(help="Where models run.")]


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
        typer.Option(help="Checkpoint folder, hub id or 'organism', instead of the recipe's."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory [default: runs/RECIPE].")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="A.B=C",
            callback=parted,
            help="Override a key of the recipe; any number, in the variable parted by ';'.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Most behaviours per cell and rows per task.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of training, mixing and sampling.")
    ] = None,
    device: Where = "cpu",
    batch_size: BatchSize = "auto",
    backend: Computes = "fastsafe",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, write nothing.")
    ] = False,
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Delete the run there and start over.")
    ] = False,
    as_json: AsJson = False,
    show_completions: ShowCompletions = False,
    allow_code_exec: Annotated[
        bool,
        typer.Option(
            "--allow-code-exec",
            help="Run the Python that models write against the tests of their rows, shut in by "
            "bubblewrap: pass@1.",
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """Fine-tune, probe, judge and report; run again to resume.

    Exit codes: 0 done, 1 error, 2 usage, 3 too few answers could be judged, 130 interrupted.
    """
    from fastsafe import progress
    from fastsafe.audit import run

    plan, runtime = run.prepare(
        recipe,
        model=model,
        overrides=[word.strip() for word in overrides or ()],
        limit=limit,
        seed=seed,
        device=device,
        batch_size=batch_size_of(batch_size),
        backend=backend,
        out=out,
        api_keys=os.environ,
    )
    if dry_run:
        from fastsafe.audit.plan.foresight import describe

        show(describe(plan), as_json)
        return
    done = run.execute(
        plan,
        runtime,
        out or run.default_out(plan.recipe),
        resume=not no_resume,
        show_completions=show_completions,
        allow_code_exec=allow_code_exec,
        progress=progress.for_terminal(as_json=as_json),
    )
    _finish(done, as_json)


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


def judge(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    recipe: Annotated[
        str | None, typer.Option(help="Whose judges, guards and thresholds to take.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="A.B=C",
            callback=parted,
            help="Set judges, guards or thresholds; any number, in the variable parted by ';'.",
        ),
    ] = None,
    device: Where = "cpu",
    as_json: AsJson = False,
    show_completions: ShowCompletions = False,
    debug: Debug = False,
) -> None:
    """Judge the answers of a run again, or by others; what is judged stays, nothing is generated.

    Exit codes: 0 done, 1 error, 2 usage, 3 too few answers could be judged, 130 interrupted.
    """
    from fastsafe import progress
    from fastsafe.audit import run

    done = run.judge(
        run_dir,
        recipe,
        overrides=overrides or (),
        device=device,
        api_keys=os.environ,
        show_completions=show_completions,
        progress=progress.for_terminal(as_json=as_json),
    )
    _finish(done, as_json)


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
        fail(
            f"error: run {run.path}: coverage is {covered:.3f} in the least covered cell, "
            f"expected {wanted:.3f}; {how_to_finish}, or lower thresholds.coverage",
            EXIT_COVERAGE,
        )
