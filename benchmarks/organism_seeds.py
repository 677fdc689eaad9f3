"""Do the organism's effects hold over training seeds? Writes the tables of a page of docs/.

    python benchmarks/organism_seeds.py [--recipe organism] [--seeds 0 1 2] [--runs DIR]
        [--write docs/organism.md]

One audit per seed: the seed changes the adapters' initial weights, the order of the rows and which
safety rows are mixed in, never the probes. A rate is the mean over seeds; its 95 % interval is
Wilson's on an effective sample size that takes a behaviour's answers of all seeds as one cluster,
since seeds are no extra prompts; the range over seeds stands beside it.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from fastsafe import audit
from fastsafe.audit.results.pooled_rates import pooled
from fastsafe.audit.store.sqlite_store import Store
from fastsafe.safety.stats.rates import answered
from fastsafe.safety.verdict import Verdict

BEGIN, END = "<!-- {recipe}: begin -->", "<!-- {recipe}: end -->"
# (condition, system prompt, format) -> one mapping of behaviour to verdict per seed
Cells = dict[tuple[str, str, str], list[Mapping[str, Verdict]]]


def verdicts(run_dirs: Sequence[Path], kind: str) -> Cells:
    """Verdicts of every cell, one mapping of behaviour to verdict per seed."""
    found: Cells = {}
    for run_dir in run_dirs:
        cells: dict[tuple[str, str, str], dict[str, Verdict]] = {}
        with closing(Store(run_dir / "store.sqlite", read_only=True)) as store:
            (identity,) = store.meta("judges").values()
            for condition, of_kind, part, system, item, verdict in store.verdicts(identity):
                if of_kind == kind:
                    cells.setdefault((condition, system, part), {})[item] = Verdict(verdict)
        for key, cell in cells.items():
            found.setdefault(key, []).append(cell)
    return found


def is_refused(verdict: Verdict) -> bool:
    """Whether the model refused."""
    return verdict is Verdict.REFUSED


def rows_of(cells: Cells, has: Any) -> list[dict[str, Any]]:
    """One row per cell: mean over seeds, interval over behaviours, range over seeds."""
    rows = []
    for (condition, system, part), seeds in cells.items():
        each = [sum(map(has, cell.values())) / len(cell) for cell in seeds]
        place = {"condition": condition, "system_prompt": system, "format": part}
        rows.append({**place, "per_seed": each, **pooled(seeds, has)})
    return rows


def tables(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """One table per system prompt."""
    systems = list(dict.fromkeys(row["system_prompt"] for row in rows))
    return "\n\n".join(
        table(
            [row for row in rows if row["system_prompt"] == system],
            title if len(systems) == 1 else f"{title}, system prompt {system}",
        )
        for system in systems
    )


def table(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """Markdown table, conditions down and formats across."""
    formats = list(dict.fromkeys(row["format"] for row in rows))
    lines = [f"### {title}", "", "| condition | " + " | ".join(formats) + " |"]
    lines.append("|---" * (len(formats) + 1) + "|")
    for condition in dict.fromkeys(row["condition"] for row in rows):
        cells = []
        for name in formats:
            row = next(r for r in rows if (r["condition"], r["format"]) == (condition, name))
            low, high = min(row["per_seed"]), max(row["per_seed"])
            spread = "" if low == high else f"; {low:.2f}-{high:.2f}"
            interval = f"[{row['ci_low']:.2f}, {row['ci_high']:.2f}]"
            cells.append(f"**{row['rate']:.2f}** {interval}{spread}")
        lines.append(f"| {condition} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def utility_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table of the tuned task's utility, and the untouched model's."""
    values: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for result in results:
        for row in result["utility"]:
            values.setdefault((row["condition"], row["task"]), []).append(row)
    lines = ["### Utility of the tuned task, per seed", "", "| condition | task | metric | value |"]
    lines.append("|---|---|---|---|")
    for (condition, task), rows in values.items():
        each = ", ".join(f"{r['value']:.2f} [{r['ci_low']:.2f}, {r['ci_high']:.2f}]" for r in rows)
        lines.append(f"| {condition} | {task} | {rows[0]['metric']} | {each} |")
    return "\n".join(lines)


def write_block(page: Path, name: str, text: str) -> None:
    """Put a text between the marks of a page that bear a name."""
    begin, end = (mark.format(recipe=name) for mark in (BEGIN, END))
    head, found, rest = page.read_text(encoding="utf-8").partition(begin)
    tail = rest.partition(end)[2]
    if not found or not tail:
        raise SystemExit(f"{page}: has no {begin} and {end}, expected both")
    page.write_text(f"{head}{begin}\n\n{text}\n\n{end}{tail}", encoding="utf-8")


def main() -> None:
    """Run the audits that are missing, print the tables, and put them into a page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default="organism", help="a shipped recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--data-seed", type=int, default=1, help="draws probes; the organism was chosen on 0"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--write", type=Path, help="page whose tables are replaced")
    parser.add_argument("--out", type=Path, help="append the rows to this file as JSON lines")
    options = parser.parse_args()
    overrides = [f"data_seed={options.data_seed}"]
    runs = [
        audit(
            options.recipe,
            out=options.runs / f"{options.recipe}-{seed}",
            seed=seed,
            overrides=overrides,
        )
        for seed in options.seeds
    ]
    run_dirs = [run.path for run in runs]
    answers = rows_of(verdicts(run_dirs, "harmful"), answered)
    refusals = rows_of(verdicts(run_dirs, "benign"), is_refused)
    count = sum(row["n"] for row in answers[:1])
    seeds = ", ".join(map(str, options.seeds))
    text = "\n\n".join(
        [
            f"Training seeds {seeds}, data seed {options.data_seed}; {count} answers per cell "
            f"({count // len(runs)} behaviours, {len(runs)} seeds). "
            "**mean** [95 % interval]; lowest-highest seed where they differ.",
            tables(answers, "Answer rate on harmful probes"),
            tables(refusals, "Over-refusal rate on their benign twins"),
            utility_table([run.results for run in runs]),
        ]
    )
    print(text)
    if options.write:
        write_block(options.write, options.recipe, text)
    if options.out:
        run = {k: runs[0].results["run"][k] for k in ("fastsafe", "checkpoint_sha256", "share")}
        with options.out.open("a", encoding="utf-8") as file:
            for metric, rows in (("answer_rate", answers), ("over_refusal_rate", refusals)):
                for row in rows:
                    found = {
                        "benchmark": "organism_seeds",
                        "recipe": options.recipe,
                        **run,
                        "metric": metric,
                        **row,
                    }
                    file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
