"""One audit from recipe to report."""

import json
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import fastsafe
from fastsafe.audit import manifest
from fastsafe.audit.backend.on_engine import ModelRuntime
from fastsafe.audit.backend.protocol import Runtime
from fastsafe.audit.plan.foresight import foresight
from fastsafe.audit.plan.make_plan import (
    Plan,
    differences,
    families,
    make_plan,
    settings,
    with_words,
)
from fastsafe.audit.plan.panel import Panel, make_panel
from fastsafe.audit.recipe.load import load, revise
from fastsafe.audit.recipe.schema import Recipe
from fastsafe.audit.results.make_results import make_results
from fastsafe.audit.results.schema.run import Results
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
from fastsafe.audit.sources.registry import source_of
from fastsafe.audit.stages import code_tests, train
from fastsafe.audit.stages import judge as judge_stage
from fastsafe.audit.store import lock
from fastsafe.audit.store import sqlite_store as stores
from fastsafe.audit.store.sqlite_store import Store
from fastsafe.errors import RecipeError, StoreError
from fastsafe.io import atomic
from fastsafe.progress import Progress

OF_JUDGES = {"judges", "guards", "thresholds"}


@dataclass(frozen=True)
class Run:
    """A run directory and what it found.

    Attributes:
        path: The run directory.
        results: What ``results.json`` holds, schema ``fastsafe.results/1``.
    """

    path: Path
    results: Results

    @property
    def is_covered(self) -> bool:
        """Whether every cell has enough judged answers for the recipe's threshold."""
        run = self.results["run"]
        return bool(run["coverage"] >= run["coverage_threshold"])

    def table(self, width: int = 120) -> str:
        """Return the terminal table as plain text, at most ``width`` columns wide."""
        from fastsafe.audit.report import table_text

        return table_text(self.results, width)


def audit(
    recipe: str | Path | Recipe = "organism",
    *,
    out: str | Path | None = None,
    model: str | None = None,
    overrides: Iterable[str] = (),
    limit: int | None = None,
    seed: int | None = None,
    device: str = "cpu",
    batch_size: int | Literal["auto"] = "auto",
    backend: str = "fastsafe",
    api_keys: Mapping[str, str] | None = None,
    resume: bool = True,
    show_completions: bool = False,
    allow_code_exec: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Fine-tune, probe, judge and report, as a recipe says.

    Args:
        recipe: Name of a shipped recipe, path of a YAML file, or a ``Recipe``.
        out: Run directory; ``runs/<recipe's name>`` when None. An unfinished run there is
            continued, a finished one is reported again.
        model: Checkpoint folder, hub id or ``"organism"``, instead of the recipe's.
        overrides: ``a.b=c`` settings on top of the recipe.
        limit: Most behaviours per cell and utility rows per task.
        seed: Of training, mixing and sampling, instead of the recipe's.
        device: ``"cpu"`` or ``"cuda"``.
        batch_size: Most rows computed together.
        backend: ``"fastsafe"`` or ``"transformers"``.
        api_keys: Keys of judges' endpoints, by the name that the recipe gives them.
        resume: False starts over and deletes what the run directory holds.
        show_completions: Whether ``report.html`` quotes prompts and completions.
        allow_code_exec: Whether Python that a model writes is run against its rows' tests, shut in
            by bubblewrap.
        progress: Where to show progress; nowhere when None.

    Returns:
        The finished run.

    Raises:
        RecipeError: The recipe does not exist or does not check.
        CheckpointError: The checkpoint is missing, malformed or refused.
        StoreError: The run directory is in use, from another recipe, or cannot be written.

    Example:
        >>> run = audit("organism", out="runs/first", limit=10)  # doctest: +SKIP
        >>> print(run.table())  # doctest: +SKIP
    """
    plan, runtime = prepare(
        recipe,
        model=model,
        overrides=overrides,
        limit=limit,
        seed=seed,
        device=device,
        batch_size=batch_size,
        backend=backend,
        out=out,
        api_keys=api_keys,
    )
    return execute(
        plan,
        runtime,
        Path(out) if out is not None else default_out(plan.recipe),
        resume=resume,
        show_completions=show_completions,
        allow_code_exec=allow_code_exec,
        progress=progress or Progress(),
    )


def default_out(recipe: Recipe) -> Path:
    """Return the run directory of a recipe that was given none."""
    return Path("runs") / recipe.name


def prepare(
    recipe: str | Path | Recipe,
    *,
    model: str | None = None,
    overrides: Iterable[str] = (),
    limit: int | None = None,
    seed: int | None = None,
    device: str = "cpu",
    batch_size: int | Literal["auto"] = "auto",
    backend: str = "fastsafe",
    out: str | Path | None = None,
    api_keys: Mapping[str, str] | None = None,
) -> tuple[Plan, ModelRuntime]:
    """Check the recipe and the checkpoint and lay out the run; nothing is written.

    Arguments are those of ``audit``.

    Raises:
        FastsafeError: The recipe, the checkpoint or its tokenizer does not check.
    """
    changes = {"model": model, "seed": seed}
    if isinstance(recipe, Recipe):
        recipe = revise(recipe, overrides=overrides, changes=changes)
    else:
        recipe = load(recipe, overrides=overrides, changes=changes)
    recipe = recipe.limited(limit)
    runtime = ModelRuntime(
        recipe.model,
        device=device,
        dtype=recipe.dtype,
        quantize=recipe.quantize,
        batch_size=batch_size,
        backend=backend,
    )
    runtime.check_training(recipe)
    folder = (default_out(recipe) if out is None else Path(out)) / JUDGES
    panel = make_panel(recipe, device=device, api_keys=api_keys, folder=folder)
    source = source_of(recipe, device)
    return make_plan(recipe, source, runtime.tokenizer, runtime.engine, panel), runtime


def execute(
    plan: Plan,
    runtime: Runtime,
    run_dir: Path,
    *,
    resume: bool = True,
    show_completions: bool = False,
    allow_code_exec: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Do what is planned and not yet done in ``run_dir``, then report.

    Raises:
        StoreError: The run directory is in use, from another recipe, or cannot be written.
        UsageError: Code is allowed to run, and cannot be shut in here.
    """
    progress = progress or Progress()
    if allow_code_exec:
        code_tests.check(plan)
    if is_new(run_dir) or not resume:
        # a checkpoint that cannot be loaded must leave no trace
        runtime.load()
    with explained(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    with lock.exclusive(run_dir), explained(run_dir):
        for folder in (run_dir, run_dir / EXPORTS):
            atomic.remove_leftovers(folder)
        if not resume:
            clear(run_dir)
        with closing(_open(run_dir, plan)) as store:
            started_at = store.meta("started_at")
            manifest.write_manifest(run_dir, plan, runtime, started_at)
            progress.event("run_started", out=str(run_dir), answers=len(plan.rows))
            for sentence in foresight(plan).values():
                progress.say(sentence)
            if plan.recipe.rewrite:
                runtime.release()  # room for the model that words
            plan, rewrites = with_words(plan, progress)
            if (store.meta("rewrites") or []) != rewrites:
                with store.transaction():
                    store.set_meta({"rewrites": rewrites})
            train.train(plan, store, runtime, run_dir, progress)
            train.derive(plan, store, runtime, run_dir, progress)
            train.generate(plan, store, runtime, run_dir, progress)
            runtime.release()
            judge_stage.filter_answers(plan, store, progress)
            judge_stage.measure(plan, store, progress)
            _judge(plan.panel, plan.recipe, store, progress)
            if allow_code_exec:
                code_tests.run_all(store, progress)
            run = _finished(run_dir, store, show_completions)
    progress.event("run_finished", results=str(run_dir / RESULTS), covered=run.is_covered)
    return run


def judge(
    run_dir: Path,
    recipe: str | Path | None = None,
    *,
    overrides: Iterable[str] = (),
    device: str = "cpu",
    api_keys: Mapping[str, str] | None = None,
    show_completions: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Judge the answers of a run, and report it again; nothing is trained or generated.

    Args:
        run_dir: Of a run, finished or not.
        recipe: Whose judges, guards and thresholds to take; None takes those of the run.
        overrides: ``a.b=c`` settings of judges, guards and thresholds on top.
        device: Where judges that are checkpoints run.
        api_keys: As for ``audit``.
        show_completions: As for ``audit``.
        progress: As for ``audit``.

    Raises:
        RecipeError: A judge does not check, or something else was set.
        StoreError: There is no run, it is in use, or cannot be written.
    """
    progress, path = progress or Progress(), store_of(run_dir)
    with lock.exclusive(run_dir), explained(run_dir), closing(Store(path)) as store:
        old = Recipe.model_validate(store.meta("recipe"))
        taken = load(recipe) if recipe is not None else old
        taken = revise(old, changes={key: getattr(taken, key) for key in OF_JUDGES})
        new = revise(taken, overrides=overrides)
        if old.model_dump(exclude=OF_JUDGES) != new.model_dump(exclude=OF_JUDGES):
            raise RecipeError(
                f"run {run_dir}: only {', '.join(sorted(OF_JUDGES))} can be set anew; "
                "for the rest use fastsafe audit with another --out"
            )
        panel = make_panel(new, device=device, api_keys=api_keys, folder=run_dir / JUDGES)
        kept = _keep(store, new, panel)
        record = {key: kept[key] for key in ("recipe", "judges", "guards")}
        record |= {"fastsafe": kept["version"], "families": families(store.cells(), panel)}
        manifest.revise_manifest(run_dir, record)
        _judge(panel, new, store, progress)
        return _finished(run_dir, store, show_completions)


def report(run_dir: Path, *, show_completions: bool = False) -> Run:
    """Compute results and report of a run again from its store, finished or not.

    Raises:
        StoreError: There is no run, or the reports cannot be written.
    """
    with closing(Store(store_of(run_dir), read_only=True)) as store:
        return _report(run_dir, store, show_completions)


def _judge(panel: Panel, recipe: Recipe, store: Store, progress: Progress) -> None:
    judge_stage.judge(panel, store, progress)
    judge_stage.guard(panel, store, progress)
    # last, so that a budget goes to the answers first
    judge_stage.calibrate(panel, recipe.formats, store, progress)


def _finished(run_dir: Path, store: Store, show_completions: bool) -> Run:
    """Report a run whose stages have ended; one that is not covered has not finished."""
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


def _open(run_dir: Path, plan: Plan) -> Store:
    """Open the run's store; a new one gets the plan, an old one must have the same."""
    store = Store(run_dir / stores.NAME, create=True)
    try:
        if store.meta("identity") is None:
            prompts = {p.sha256: (p.text, p.token_ids) for p in plan.prompts.values()}
            with store.transaction():
                store.add_plan(plan.rows, prompts)
                store.set_meta(
                    {
                        "identity": plan.identity,
                        "settings": settings(plan),
                        "conditions": [condition.record() for condition in plan.conditions],
                        "engine": dict(plan.engine),
                        "translator": plan.translator,
                        "templates": dict(plan.templates),
                        "started_at": stores.now(),
                    }
                )
        _check_same(store, plan)
        _keep(store, plan.recipe, plan.panel)
    except BaseException:
        store.close()
        raise
    return store


def _keep(store: Store, recipe: Recipe, panel: Panel) -> dict[str, Any]:
    """Keep who judges, which a later command may change; returns what is kept."""
    kept = {
        "recipe": recipe.model_dump(mode="json"),
        "judges": panel.identities,
        "guards": panel.guard_identities,
        "harmful_only": panel.harmful_only,
        "wordings": panel.wording_identities,
        "calibrated": dict(panel.calibrated),
        "version": fastsafe.__version__,
    }
    if any(store.meta(key) != value for key, value in kept.items()):
        with store.transaction():
            store.set_meta(kept)
    return kept


def _check_same(store: Store, plan: Plan) -> None:
    if store.meta("identity") == plan.identity:
        return
    # through JSON, as the store did: tuples become lists
    changed = differences(store.meta("settings"), json.loads(json.dumps(settings(plan))))
    what = "; ".join(changed) or "this version of fastsafe plans other rows for the same recipe"
    raise StoreError(
        f"run {store.path.parent}: was made with other settings ({what}); "
        "use the same ones, another --out, or --no-resume to start over"
    )
