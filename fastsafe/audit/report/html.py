"""``report.html``: one file that opens from disk, runs nothing and loads nothing."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files

from fastsafe.audit.report import matrix as views
from fastsafe.audit.report.curves import curves
from fastsafe.audit.report.escape import escaped
from fastsafe.audit.report.palette import Quantity, fill, ink
from fastsafe.audit.report.quotes import Quote, visible
from fastsafe.audit.report.words import mitigations, sentences
from fastsafe.audit.results.schema.run import Results
from fastsafe.audit.unanswered import sentence

_SHADES = 20


def report_html(
    results: Results,
    heatmap_svg: str,
    losses: Mapping[str, Sequence[float]],
    quotes: Sequence[Quote],
) -> str:
    """Return the HTML of ``report.html``.

    Its content security policy allows no script, no request and only this page's own style, so
    that text written by a model can run nothing, however a browser parses it.

    Args:
        results: Results of the run.
        heatmap_svg: Heat map, embedded as an image, which cannot run anything either.
        losses: Training loss per step, by condition.
        quotes: Examples, redacted already where they must be.
    """
    from jinja2 import Environment, StrictUndefined

    results = escaped(results)
    folder = files("fastsafe.audit.report")
    css = (folder / "report.css").read_text(encoding="utf-8") + _shades()
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "percent": views.percent,
        "points": views.points,
        "label": views.label,
        "p_value": views.p_value,
        "visible": visible,
    }
    template = environment.from_string((folder / "report.html").read_text(encoding="utf-8"))
    style_hash = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    image = base64.b64encode(heatmap_svg.encode()).decode()
    return template.render(
        results=results,
        run=results["run"],
        css=css,
        style_hash=style_hash,
        image=image,
        sentences=sentences(results),
        unanswered=[sentence(row) for row in results.get("unanswered", ())],
        seed_tables=[
            (title, view, rows)
            for kind, title in views.SEED_TABLES.items()
            for view, rows in views.over_seeds(results, kind).items()
        ],
        matrices=list(views.matrices(results)),
        mitigations=mitigations(results),
        curves=curves(results, losses),
        seeds=_seeds(results),
        quotes=quotes,
        alpha=views.ALPHA,
        interval=views.interval,
        at_most=views.at_most,
        sign=views.sign,
        is_mute=views.is_mute,
        tuned_on=views.tuned_on,
        shade=_shade,
    )


def _shade(rate: float | None) -> str:
    """Return the CSS class of a rate's colour; a style attribute would need a weaker policy."""
    return "none" if rate is None else f"s{round(rate * _SHADES)}"


def _shades() -> str:
    """Return the CSS rules of the colour classes, one per quantity and shade."""
    rules = []
    quantities: tuple[Quantity, ...] = ("answered", "refused")
    for quantity in quantities:
        for step in range(_SHADES + 1):
            colour = fill(quantity, step / _SHADES)
            rules.append(f".{quantity}.s{step}{{background:{colour};color:{ink(colour)}}}")
    return "\n" + "\n".join(rules) + "\n"


def _seeds(results: Results) -> list[int]:
    """Return the conditions' training seeds; the run's own where the recipe lists none."""
    seeds = (condition["seed"] for condition in results["conditions"])
    return sorted({seed for seed in seeds if seed is not None}) or [results["run"]["seed"]]
