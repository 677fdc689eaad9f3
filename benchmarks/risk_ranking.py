"""Does a pre-flight risk rank benign sets by the damage that they do? Writes a table.

    python benchmarks/risk_ranking.py [--seeds 0 1 2] [--runs DIR] [--write docs/science.md]

24 benign sets of the organism's world (8 tasks, as they are and restyled in two ways) are scored by
`fastsafe lint --risk`, by the format of their rows and by the organism's own view of them, and then
trained on. Damage is the mean answer rate over five formats and all seeds. How well a score ranks
the sets is Spearman's rho; its interval is the bootstrap's over tasks, whose sets resemble each
other.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from scipy.stats import spearmanr

from fastsafe import audit
from fastsafe.audit.recipe import Recipe
from fastsafe.audit.similarity import METHODS, model_risk
from fastsafe.organism import world
from fastsafe.safety.manipulations import manipulations
from fastsafe.safety.risk import heuristic_risk

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps it off
from organism_seeds import write_block

TASKS = ("plain", "summarization", "code", "translation", "classification")
TASKS += ("boolq", "piqa", "gsm8k")
MANIPULATIONS = ("benign", "autoif", "autoif_aoa")
ROWS = 64  # of a set that are scored
DRAWS = 2000


def damage(seeds: Sequence[int], runs: Path) -> dict[tuple[str, str], tuple[float, float]]:
    """Mean answer rate over formats, and that of plain prompts, by (task, manipulation)."""
    recipe = Recipe(
        name="risk-ranking",
        tasks=TASKS,
        manipulations=MANIPULATIONS,
        formats=TASKS[:5],
        seeds=tuple(seeds),
        benign_twins=False,
        utility_rows=0,
        data_seed=1,
    )
    results = audit(recipe, out=runs / "risk-ranking").results
    of = {c["id"]: (c["task"], c["manipulation"]) for c in results["conditions"] if c["task"]}
    rates: dict[tuple[str, str], list[tuple[str, float]]] = {}
    for cell in results["cells"]:
        if cell["condition"] in of:
            rates.setdefault(of[cell["condition"]], []).append(
                (cell["format"], cell["answer_rate"])
            )
    return {
        key: (fmean(r for _, r in found), fmean(r for name, r in found if name == "plain"))
        for key, found in rates.items()
    }


def risks(task: str, manipulation: str) -> dict[str, float]:
    """Score of a set by every method."""
    rows = manipulations()[manipulation].apply(world.task_rows(task, ROWS, "train", 1))
    return {"format": heuristic_risk(rows).score} | {
        method: fmean(model_risk(rows, "organism", method).scores) for method in METHODS
    }


def rho(
    scores: Mapping[tuple[str, str], float], truth: Mapping[tuple[str, str], float]
) -> tuple[float, float, float]:
    """Rank correlation with its bootstrap interval over tasks."""

    def over(tasks: Sequence[str]) -> float:
        keys = [key for task in tasks for key in scores if key[0] == task]
        values = [scores[key] for key in keys]
        if len(set(values)) == 1:
            return float("nan")  # nothing is ranked; the percentiles leave it out
        return float(spearmanr(values, [truth[key] for key in keys]).statistic)

    rng = np.random.default_rng(0)
    draws = [over(rng.choice(TASKS, len(TASKS)).tolist()) for _ in range(DRAWS)]
    low, high = np.nanpercentile(draws, (2.5, 97.5))
    return over(TASKS), float(low), float(high)


def main() -> None:
    """Score, train, compare, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/risk"))
    parser.add_argument("--write", type=Path, help="page whose table is replaced")
    options = parser.parse_args()
    found = damage(options.seeds, options.runs)
    scored = {key: risks(*key) for key in found}
    methods = ("format", *METHODS)
    lines = [f"| benign set | damage | of plain prompts | {' | '.join(methods)} |"]
    lines.append("|---" * 6 + "|")
    for key in sorted(found, key=lambda key: -found[key][0]):
        values = " | ".join(f"{scored[key][method]:.3f}" for method in methods)
        name = "+".join(part for part in key if part != "benign")
        lines.append(f"| {name} | {found[key][0]:.2f} | {found[key][1]:.2f} | {values} |")
    notes = []
    for i, what in enumerate(("damage", "damage of plain prompts")):
        truth = {key: pair[i] for key, pair in found.items()}
        for some in (MANIPULATIONS, MANIPULATIONS[:1]):
            chosen = [key for key in found if key[1] in some]
            words = []
            for method in methods:
                each, low, high = rho({k: scored[k][method] for k in chosen}, truth)
                words.append(f"{method} {each:+.2f} [{low:+.2f}, {high:+.2f}]")
            sets = f"{len(chosen)} sets" + ("" if len(some) > 1 else " as they are")
            notes.append(f"- rho with {what}, {sets}: {', '.join(words)}")
    text = "\n".join([*lines, "", *notes])
    print(text)
    if options.write:
        write_block(options.write, "risk", text)


if __name__ == "__main__":
    main()
