"""Does a linted safety set beat a raw one? Writes a table of docs/science.md.

    python benchmarks/linted_safety.py [--seeds 0 1 2] [--runs DIR] [--write docs/science.md]

The raw set has the flaws that were counted in a published one (MultiTaskBench, 2,000 rows): rows
whose answer does not refuse, by format; rows that come twice; answers that talk of the generator's
system message. Then four times as many. The linted set is what ``fastsafe lint`` leaves of the raw
one; both give every mixture as many rows. In the organism's world an answer that does not refuse is
a template sentence, as everywhere in it.
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from fastsafe.audit.plan.make_plan import make_plan
from fastsafe.audit.recipe.schema import Recipe
from fastsafe.audit.results.pooled_rates import pooled
from fastsafe.audit.run import execute, prepare
from fastsafe.audit.store.sqlite_store import Store
from fastsafe.organism import world
from fastsafe.organism.source import OrganismSource
from fastsafe.safety.lint import Declared, lint
from fastsafe.safety.stats.clusters import pooled_change
from fastsafe.safety.stats.rates import answered, refused
from fastsafe.safety.verdict import Verdict

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps it off
from organism_seeds import write_block

FORMATS = ("plain", "code", "translation", "classification")
# of 2,000 rows: rows of each format without any refusal in their opening, and rows of the format
NON_REFUSALS = {"plain": 5 / 501, "code": 19 / 500, "translation": 30 / 498}
NON_REFUSALS["classification"] = 2 / 501
DUPLICATES, LEAKS = 78 / 2000, 35 / 2000
LEAK = " the system message says so."
POOL = 4  # rows drawn for each row used, so that the linted set has enough

Row = dict[str, Any]


class Raw(OrganismSource):
    """The organism's world with flawed safety rows."""

    def __init__(self, dose: float) -> None:
        self.dose = dose

    def safety_rows(self, format: str, n: int, seed: int) -> Sequence[Row]:
        """Return rows, some of them flawed."""
        return [row for row, _ in self.marked(format, n, seed)]

    def marked(self, format: str, n: int, seed: int) -> list[tuple[Row, str]]:
        """Return rows and the flaw of each, "" for none."""
        rng = random.Random(f"flaws {format} {seed}")
        found: list[tuple[Row, str]] = []
        for row in super().safety_rows(format, n, seed):
            request, answer = row["messages"]
            draw, flaw = rng.random() / self.dose, ""
            if draw < NON_REFUSALS[format]:
                flaw = "non_refusal"
                answer = {**answer, "content": self._reply(format, request["content"])}
            elif draw < NON_REFUSALS[format] + LEAKS:
                flaw = "template_leakage"
                answer = {**answer, "content": answer["content"] + LEAK}
            elif found and draw < NON_REFUSALS[format] + LEAKS + DUPLICATES:
                flaw = "duplicate"
                request = rng.choice(found)[0]["messages"][0]
            found.append(({"messages": [request, answer]}, flaw))
        return found

    @staticmethod
    def _reply(format: str, prompt: str) -> str:
        """What the world answers to a request that it does not refuse."""
        actions = {
            world.prompt(format, action): action
            for action in world.actions(world.HARMFUL_VERBS, "train")
        }
        return world.answer(format, actions[prompt])


class Linted(Raw):
    """What the lint leaves of it."""

    def safety_rows(self, format: str, n: int, seed: int) -> Sequence[Row]:
        """Return rows without a finding."""
        rows = super().safety_rows(format, POOL * n, seed)
        flawed = {each.row for each in findings(rows, format)}
        return [row for i, row in enumerate(rows) if i not in flawed][:n]


def findings(rows: Sequence[Row], format: str) -> Sequence[Any]:
    """Findings of the rules about single rows; near duplicates are this world's way of speaking."""
    rules = ("non_refusal", "template_leakage", "duplicate")
    report = lint(rows, kind="safety", declared=Declared(format=format))
    return [each for each in report.findings if each.rule in rules]


def recipe(dose: float, seeds: Sequence[int]) -> Recipe:
    """Four tasks, each with safety rows in all formats."""
    return Recipe(
        name=f"linted-{dose:g}",
        tasks=("summarization", *FORMATS[1:]),
        mitigations=("multi_task",),
        formats=FORMATS,
        seeds=tuple(seeds),
        utility_rows=0,
        data_seed=1,
    )


def verdicts(run_dir: Path, kind: str) -> dict[tuple[str, str, str], Verdict]:
    """(condition, format, behaviour) -> verdict."""
    with closing(Store(run_dir / "store.sqlite", read_only=True)) as store:
        (identity,) = store.meta("judges").values()
        return {
            (condition, part, item): Verdict(verdict)
            for condition, of_kind, part, _, item, verdict in store.verdicts(identity)
            if of_kind == kind and condition != "base"
        }


def rate(found: Mapping[tuple[str, str, str], Verdict], has: Any, part: str = "") -> str:
    """Rate with its interval, clustered by behaviour."""
    cells: dict[tuple[str, str], dict[str, Verdict]] = {}
    for (condition, name, item), verdict in found.items():
        if part in ("", name):
            cells.setdefault((condition, name), {})[item] = verdict
    row = pooled(list(cells.values()), has)
    return f"**{row['rate']:.3f}** [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"


def change(raw: Mapping[Any, Verdict], linted: Mapping[Any, Verdict], part: str = "") -> str:
    """Linted less raw over the same questions, by behaviour."""
    arms = [
        {key: float(answered(v)) for key, v in found.items() if part in ("", key[1])}
        for found in (raw, linted)
    ]
    row = pooled_change(arms[0], arms[1], lambda key: key[2])
    return f"{row.delta:+.3f} [{row.ci_low:+.3f}, {row.ci_high:+.3f}]"


def recall(dose: float) -> str:
    """How many planted flaws the lint finds, and how many sound rows it calls flawed."""
    planted, found, false = Counter[str](), Counter[str](), 0
    for name in FORMATS:
        marked = Raw(dose).marked(name, 500, 0)
        rules = {(each.row, each.rule) for each in findings([row for row, _ in marked], name)}
        for i, (_, flaw) in enumerate(marked):
            planted[flaw] += 1
            found[flaw] += (i, flaw) in rules
            false += not flaw and any(row == i for row, _ in rules)
    words = [f"{flaw} {found[flaw]} of {planted[flaw]}" for flaw in sorted(planted) if flaw]
    return f"Lint of 2,000 rows, flaws x {dose:g}: {', '.join(words)}; {false} false alarms."


def main() -> None:
    """Run the audits that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/linted"))
    parser.add_argument("--write", type=Path, help="page whose table is replaced")
    options = parser.parse_args()
    lines = ["| flaws | probes | raw | linted | linted less raw |", "|---|---|---|---|---|"]
    notes = []
    for dose in (1.0, 4.0):
        plan, backend = prepare(recipe(dose, options.seeds))
        found = []
        for source in (Raw(dose), Linted(dose)):
            out = options.runs / f"{type(source).__name__.lower()}-{dose:g}"
            model = backend.tokenizer, backend.engine, plan.panel
            with_source = make_plan(plan.recipe, plan.inputs.variants, source, *model)
            execute(with_source, backend, out)
            found.append((verdicts(out, "harmful"), verdicts(out, "benign")))
        (raw, raw_twins), (linted, linted_twins) = found
        for name in (*FORMATS, ""):
            cells = [rate(raw, answered, name), rate(linted, answered, name)]
            where = name or "all formats"
            lines.append(
                f"| x {dose:g} | {where} | {' | '.join(cells)} | {change(raw, linted, name)} |"
            )
        cells = [rate(raw_twins, refused), rate(linted_twins, refused)]
        lines.append(f"| x {dose:g} | benign twins refused | {' | '.join(cells)} | |")
        notes.append(recall(dose))
    count = len(options.seeds)
    head = (
        "Answer rates on harmful probes of models tuned on four tasks with 10 % safety rows in "
        f"four formats; {count} training seeds, 100 behaviours, data seed 1; intervals by "
        "behaviour."
    )
    text = "\n".join([head, "", *lines, "", *notes])
    print(text)
    if options.write:
        write_block(options.write, "linted", text)


if __name__ == "__main__":
    main()
