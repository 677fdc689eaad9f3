"""Run one audit from recipe to report; judge or report a finished one again."""

from collections.abc import Iterable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fastsafe.audit import manifest
from fastsafe.audit.backend.completer import CheckpointCompleter
from fastsafe.audit.backend.on_engine import EngineBackend
from fastsafe.audit.backend.open import open_backend
from fastsafe.audit.plan.checks import check_recipe
from fastsafe.audit.plan.foresight import power_summary
from fastsafe.audit.plan.make_plan import (
    Plan,
    families,
    make_plan,
    reword_rows,
)
from fastsafe.audit.plan.panel import Panel, make_panel
from fastsafe.audit.recipe.load import load
from fastsafe.audit.recipe.schema import Recipe
from fastsafe.audit.record import record_panel, record_plan, recorded_recipe
from fastsafe.audit.results.make_results import make_results
from fastsafe.audit.run_dir import (
    EXPORTS,
    JUDGES,
    REPORT,
    RESULTS,
    clear,
    explained,
    is_new,
    store_of,
)
from fastsafe.audit.run_result import Run
from fastsafe.audit.sources.registry import source_of
from fastsafe.audit.stages import code_tests, train
from fastsafe.audit.stages import judge as judge_stage
from fastsafe.audit.stages.generate import generate
from fastsafe.audit.store import sqlite_store as stores
from fastsafe.audit.store.sqlite_store import Store
from fastsafe.errors import RecipeError
from fastsafe.io import atomic, lock
from fastsafe.progress import Progress, Reporting, reporter

# settings that replace a recipe's: a mapping, nested or with dotted keys, or "a.b=c" strings
Overrides = Mapping[str, Any] | Iterable[str]
JUDGE_SETTINGS = {"judges", "guards", "thresholds"}


def audit(
    recipe: str | Path | Recipe = "organism",
    *,
    out: str | Path | None = None,
    model: str | Path | None = None,
    overrides: Overrides = (),
    limit: int | None = None,
    seed: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    quantize: str | None = None,
    batch_size: int | Literal["auto"] = "auto",
    backend: str = "fastsafe",
    api_keys: Mapping[str, str] | None = None,
    resume: bool = True,
    show_completions: bool = False,
    allow_code_exec: bool = False,
    progress: Reporting = None,
) -> Run:
    """Fine-tune, probe, judge and report, following a recipe.

    Args:
        recipe: Name of a shipped recipe, path of a YAML file, or a ``Recipe``.
        out: Run directory; ``runs/<recipe's name>`` when None. An unfinished run there is
            continued, a finished one is reported again.
        model: Checkpoint folder, hub id or ``"organism"``, instead of the recipe's.
        overrides: Settings that replace the recipe's: ``{"training": {"max_steps": 50}}``,
            ``{"training.max_steps": 50}`` or ``["training.max_steps=50"]``.
        limit: Maximum number of behaviours per cell and utility rows per task.
        seed: Seed of training, mixing and sampling, instead of the recipe's.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:N"``, or ``"auto"`` for a GPU if there is one.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``, instead of the recipe's.
        quantize: ``"nf4"`` holds the base in 4 bits; None takes the recipe's.
        batch_size: Maximum number of rows computed together.
        backend: ``"fastsafe"`` or ``"transformers"``.
        api_keys: Keys of judges' endpoints, by the name that the recipe gives them.
        resume: False deletes the run in the directory and starts over.
        show_completions: Whether ``report.html`` quotes prompts and completions.
        allow_code_exec: Whether Python that a model writes is run against its rows' tests, in a
            bubblewrap sandbox.
        progress: A function that is called with each event, a mapping whose key ``event`` names
            it, such as ``print``; or a ``Progress``. None logs lines of the level INFO to the
            logger ``fastsafe``.

    Returns:
        The finished run.

    Raises:
        RecipeError: The recipe does not exist or is not valid.
        CheckpointError: The checkpoint is missing, malformed or refused.
        StoreError: The run directory is in use, from another recipe, or cannot be written.

    Example:
        >>> run = audit("organism", out="runs/first", limit=10)  # doctest: +SKIP
        >>> print(run.table())  # doctest: +SKIP
    """
    plan, opened = prepare(
        recipe,
        model=model,
        overrides=overrides,
        limit=limit,
        seed=seed,
        device=device,
        dtype=dtype,
        quantize=quantize,
        batch_size=batch_size,
        backend=backend,
        out=out,
        api_keys=api_keys,
    )
    return execute(
        plan,
        opened,
        Path(out) if out is not None else default_out(plan.recipe),
        resume=resume,
        show_completions=show_completions,
        allow_code_exec=allow_code_exec,
        progress=reporter(progress),
    )


def default_out(recipe: Recipe) -> Path:
    """Return the run directory that a recipe has where the caller names none."""
    return Path("runs") / recipe.name


def prepare(
    recipe: str | Path | Recipe,
    *,
    model: str | Path | None = None,
    overrides: Overrides = (),
    limit: int | None = None,
    seed: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    quantize: str | None = None,
    batch_size: int | Literal["auto"] = "auto",
    backend: str = "fastsafe",
    out: str | Path | None = None,
    api_keys: Mapping[str, str] | None = None,
) -> tuple[Plan, EngineBackend]:
    """Check the recipe and the checkpoint and lay out the run; nothing is written.

    Arguments are those of ``audit``.

    Raises:
        FastsafeError: The recipe, the checkpoint or its tokenizer is not valid.
    """
    from fastsafe.model.device import choose_device

    changes = {
        "model": None if model is None else str(model),
        "seed": seed,
        "dtype": dtype,
        "quantize": quantize,
    }
    recipe = load(recipe, overrides=overrides, changes=changes).limited(limit)
    device = choose_device(device)
    variants = check_recipe(recipe)
    source = source_of(recipe, partial(CheckpointCompleter, device=device))
    opened = open_backend(
        backend,
        recipe.model,
        device=device,
        dtype=recipe.dtype,
        quantize=recipe.quantize,
        batch_size=batch_size,
        chat_template_kwargs=recipe.chat_template_kwargs,
    )
    opened.check_training(recipe, [variant.objective for variant in variants])
    folder = (default_out(recipe) if out is None else Path(out)) / JUDGES
    panel = make_panel(recipe, variants, device=device, api_keys=api_keys, folder=folder)
    return make_plan(recipe, variants, source, opened.tokenizer, opened.engine, panel), opened


def execute(
    plan: Plan,
    backend: EngineBackend,
    run_dir: Path,
    *,
    resume: bool = True,
    show_completions: bool = False,
    allow_code_exec: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Do the planned work that ``run_dir`` does not hold yet, then report.

    Raises:
        StoreError: The run directory is in use, from another recipe, or cannot be written.
        UsageError: Code may run, and there is no sandbox to run it in.
    """
    progress = progress or Progress()
    if allow_code_exec:
        code_tests.check(plan)
    if is_new(run_dir) or not resume:
        # a checkpoint that cannot be loaded must leave no run directory behind
        backend.load()
    with explained(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    with lock.exclusive(run_dir), explained(run_dir):
        for folder in (run_dir, run_dir / EXPORTS):
            atomic.remove_leftovers(folder)
        if not resume:
            clear(run_dir)
        with closing(Store(run_dir / stores.NAME, create=True)) as store:
            record_plan(store, plan)
            started_at = store.meta("started_at")
            manifest.write_manifest(run_dir, plan, backend, started_at)
            progress.event("run_started", out=str(run_dir), answers=len(plan.rows))
            for sentence in power_summary(plan).values():
                progress.say(sentence)
            if plan.recipe.rewrite:
                backend.release()  # makes room for the rewriter
            plan, rewrites = reword_rows(plan, progress)
            if (store.meta("rewrites") or []) != rewrites:
                with store.transaction():
                    store.set_meta({"rewrites": rewrites})
            train.train(plan, store, backend, run_dir, progress)
            train.derive(plan, store, backend, run_dir, progress)
            generate(plan, store, backend, run_dir, progress)
            backend.release()
            judge_stage.filter_answers(plan, store, progress)
            judge_stage.measure(plan, store, progress)
            _judge(plan.panel, plan.recipe, store, progress)
            if allow_code_exec:
                code_tests.run_all(store, progress)
            run = _finished(run_dir, store, show_completions)
    progress.event("run_finished", results=str(run_dir / RESULTS), covered=run.is_covered)
    return run


def judge(
    run_dir: str | Path,
    recipe: str | Path | None = None,
    *,
    overrides: Overrides = (),
    device: str = "auto",
    api_keys: Mapping[str, str] | None = None,
    show_completions: bool = False,
    progress: Reporting = None,
) -> Run:
    """Judge the answers of a run and report it again; nothing is trained or generated.

    Args:
        run_dir: A run directory, finished or not.
        recipe: Recipe whose judges, guards and thresholds are used; None uses those of the run.
        overrides: Settings of judges, guards and thresholds that replace the recipe's, as for
            ``audit``.
        device: Device of judges that are checkpoints.
        api_keys: As for ``audit``.
        show_completions: As for ``audit``.
        progress: As for ``audit``.

    Raises:
        RecipeError: A judge is not valid, or another key was set.
        StoreError: There is no run, it is in use, or cannot be written.
    """
    from fastsafe.model.device import choose_device

    run_dir, progress, device = Path(run_dir), reporter(progress), choose_device(device)
    path = store_of(run_dir)
    with lock.exclusive(run_dir), explained(run_dir), closing(Store(path)) as store:
        old = recorded_recipe(store)
        given = load(recipe) if recipe is not None else old
        new = load(old, changes={key: getattr(given, key) for key in JUDGE_SETTINGS})
        new = load(new, overrides=overrides)
        if old.model_dump(exclude=JUDGE_SETTINGS) != new.model_dump(exclude=JUDGE_SETTINGS):
            raise RecipeError(
                f"run {run_dir}: only {', '.join(sorted(JUDGE_SETTINGS))} can be set anew; "
                "for the rest use fastsafe audit with another --out"
            )
        variants = check_recipe(new)
        folder = run_dir / JUDGES
        panel = make_panel(new, variants, device=device, api_keys=api_keys, folder=folder)
        recorded = record_panel(store, new, panel)
        record = {key: recorded[key] for key in ("recipe", "judges", "guards")}
        record |= {"fastsafe": recorded["version"], "families": families(store.cells(), panel)}
        manifest.revise_manifest(run_dir, record)
        _judge(panel, new, store, progress)
        run = _finished(run_dir, store, show_completions)
    progress.event("run_finished", results=str(run_dir / RESULTS), covered=run.is_covered)
    return run


def report(run_dir: str | Path, *, show_completions: bool = False) -> Run:
    """Compute the results and the report of a run again from its store, finished or not.

    Args:
        run_dir: A run directory.
        show_completions: As for ``audit``.

    Raises:
        StoreError: There is no run, or the reports cannot be written.
    """
    run_dir = Path(run_dir)
    with closing(Store(store_of(run_dir), read_only=True)) as store:
        recorded_recipe(store)
        return _report(run_dir, store, show_completions)


def _judge(panel: Panel, recipe: Recipe, store: Store, progress: Progress) -> None:
    judge_stage.judge(panel, store, progress)
    judge_stage.guard(panel, store, progress)
    # last, so that answers come first where a budget limits judging
    judge_stage.calibrate(panel, recipe.formats, store, progress)
    judge_stage.warn_of_cut_thoughts(panel, store, progress)


def _finished(run_dir: Path, store: Store, show_completions: bool) -> Run:
    """Report a run whose stages have ended; it is finished only if every cell is covered."""
    if store.meta("finished_at") is None:
        with store.transaction():
            store.set_meta({"finished_at": stores.now()})
    run = _report(run_dir, store, show_completions)
    if not run.is_covered:
        with store.transaction():
            store.set_meta({"finished_at": None})
    return run


def _report(run_dir: Path, store: Store, show_completions: bool) -> Run:
    from fastsafe.audit.report import heatmap_svg, quotes, report_html

    results = make_results(store, store.meta("finished_at"))
    with explained(run_dir):
        atomic.write_text(run_dir / RESULTS, manifest.to_json(results))
        (run_dir / EXPORTS).mkdir(exist_ok=True)
        svg = heatmap_svg(results)
        atomic.write_text(run_dir / EXPORTS / "heatmap.svg", svg)
        html = report_html(
            results, svg, store.losses(), quotes(results, store, is_shown=show_completions)
        )
        atomic.write_text(run_dir / REPORT, html)
    return Run(run_dir, results)
