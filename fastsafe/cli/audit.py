"""``fastsafe audit``, ``judge`` and ``report``: run, judge again, report again."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastsafe.cli.options import (
    EXIT_COVERAGE,
    AsJson,
    BatchSize,
    ComputeBackend,
    DryRun,
    Dtype,
    ModelDevice,
    Quantize,
    ShowCompletions,
    announce_loading,
    batch_size_of,
    display,
    fail,
    resumable,
    show,
    warn_of_absent_device,
)

if TYPE_CHECKING:
    from fastsafe.audit.run_result import Run


def _recipe_names(incomplete: str) -> list[str]:
    from fastsafe.audit.recipe import load

    return [name for name in load.names() if name.startswith(incomplete)]


_FILE_WIDTH = 120  # columns of a table that is printed into a file or a pipe

RunDirectory = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Override a key of the recipe."),
]


def audit(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            envvar="FASTSAFE_AUDIT_RECIPE",
            help="Name of a shipped recipe (see 'fastsafe list recipes') or path of a YAML file.",
            autocompletion=_recipe_names,
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="CHECKPOINT",
            help="Checkpoint folder, hub id or 'organism', instead of the model of the recipe.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FOLDER", help="Run directory [default: runs/RECIPE]."),
    ] = None,
    overrides: Overrides = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum number of behaviours per cell and rows per task."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of training, mixing and sampling.")
    ] = None,
    device: ModelDevice = "auto",
    dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype of weights and activations [default: the recipe's].")
    ] = None,
    quantize: Quantize = None,
    batch_size: BatchSize = "auto",
    backend: ComputeBackend = "fastsafe",
    dry_run: DryRun = False,
    no_resume: Annotated[bool, typer.Option(help="Delete the run and start over.")] = False,
    as_json: AsJson = False,
    show_completions: ShowCompletions = False,
    allow_code_exec: Annotated[
        bool,
        typer.Option(
            help="Run the Python code that models write on the tests of their rows, sandboxed by "
            "bubblewrap, and report pass@1.",
        ),
    ] = False,
) -> None:
    """Fine-tune, probe, judge and report. Run the same command again to resume.

    Exit codes: 0 done, 1 error, 2 usage, 3 too few answers could be judged, 130 interrupted.
    """
    announce_loading(model, as_json=as_json)
    from fastsafe.audit import run, run_dir

    if dry_run:
        warn_of_absent_device(device)
    plan, runtime = run.prepare(
        recipe,
        model=model,
        overrides=[word.strip() for word in overrides or ()],
        limit=limit,
        seed=seed,
        device=device,
        dtype=dtype,
        quantize=quantize,
        batch_size=batch_size_of(batch_size),
        backend=backend,
        out=out,
        api_keys=os.environ,
    )
    if dry_run:
        from fastsafe.audit.plan.foresight import describe

        show(describe(plan, runtime.tokenizer), as_json)
        return
    folder = out or run.default_out(plan.recipe)
    with resumable(lambda: not run_dir.is_new(folder)):
        done = run.execute(
            plan,
            runtime,
            folder,
            resume=not no_resume,
            show_completions=show_completions,
            allow_code_exec=allow_code_exec,
            progress=display(as_json=as_json),
        )
    _finish(done, as_json)


def report(
    run_dir: RunDirectory,
    as_json: AsJson = False,
    show_completions: ShowCompletions = False,
) -> None:
    """Write the report of a run again, finished or not.

    Exit codes: 0 done, 1 error, 2 usage, 3 too few answers could be judged.
    """
    from fastsafe.audit import run

    done = run.report(run_dir, show_completions=show_completions)
    if as_json:
        typer.echo(json.dumps(done.results, indent=1))
    _finish(done, as_json, how_to_finish="finish it with fastsafe audit")


def judge(
    run_dir: RunDirectory,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="Recipe that the judges, guards and thresholds are taken from.",
            autocompletion=_recipe_names,
        ),
    ] = None,
    overrides: Overrides = None,
    device: ModelDevice = "auto",
    as_json: AsJson = False,
    show_completions: ShowCompletions = False,
) -> None:
    """Judge the answers of a run again. Nothing is generated, and existing verdicts are kept.

    The keys that --set may override are those of judges, guards and thresholds.

    Exit codes: 0 done, 1 error, 2 usage, 3 too few answers could be judged, 130 interrupted.
    """
    from fastsafe.audit import run

    with resumable(lambda: True):
        done = run.judge(
            run_dir,
            recipe,
            overrides=overrides or (),
            device=device,
            api_keys=os.environ,
            show_completions=show_completions,
            progress=display(as_json=as_json),
        )
    _finish(done, as_json)


def _finish(
    run: "Run", as_json: bool, how_to_finish: str = "run the same command to finish"
) -> None:
    from fastsafe.audit.unanswered import sentence, unscored

    if not as_json:
        from rich.console import Console

        from fastsafe.audit.report import tables

        # a file or pipe has no width of its own
        has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
        console = Console(highlight=False, width=None if has_width else _FILE_WIDTH)
        with console.capture() as printed:  # rich would end the process where a pipe is closed
            for part in tables(run.results, console.width):
                console.print(part)
            console.print(f"\nreport: {run.path / 'report.html'}", soft_wrap=True, markup=False)
        typer.echo(printed.get(), nl=False)
    silent = [sentence(row) for row in run.results.get("unanswered", ())]
    if not run.is_covered:
        covered, required = (run.results["run"][k] for k in ("coverage", "coverage_threshold"))
        cells = (*run.results["cells"], *run.results["over_refusal"])
        is_partial = any(cell["verdicts"].get("not_judged") for cell in cells)
        what_to_do = how_to_finish + ("" if is_partial else ", or lower thresholds.coverage")
        if silent:
            what_to_do = (
                f"{'; '.join(silent)}; start it, or check its address, key and budget, then "
                f"{how_to_finish}, or run fastsafe judge {run.path}"
            )
        elif unread := unscored(run.results):
            what_to_do = (
                f"{'; '.join(unread)}; raise its reply_tokens where store.sqlite has replies that "
                "are cut off, take another judge, or lower thresholds.coverage"
            )
        fail(
            f"run {run.path}: coverage is {covered:.3f} in the least covered cell, "
            f"expected {required:.3f}; {what_to_do}",
            EXIT_COVERAGE,
            as_json=as_json,
        )
    for line in silent:
        typer.echo(f"warning: {line}", err=True)
