"""Mix a safety set into a user's rows, and write the mixture with a data card."""

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import fastsafe
from fastsafe.audit.plan.panel import make_rewriter
from fastsafe.audit.recipe.schema import RewriterSettings
from fastsafe.commands.lint import LabelledSet, read_labelled_set
from fastsafe.data.conversation import Row, kind_of
from fastsafe.data.exchange import as_row, exchange_of
from fastsafe.data.packing import encode_row
from fastsafe.errors import UsageError, names_its_fields
from fastsafe.io import atomic
from fastsafe.io.digest import file_sha256
from fastsafe.safety.behaviours import Behaviour, read_behaviours
from fastsafe.safety.formats import formats
from fastsafe.safety.lint import Declared, Kind, Report, lint
from fastsafe.safety.mixing.learned_style import Style, learn
from fastsafe.safety.mixing.mitigation import (
    MODEL_WORDED,
    CountTokens,
    Mitigation,
    SafetyRows,
    mitigations,
    paraphrasing,
)
from fastsafe.safety.mixing.rewrite_checks import WORDING, Rewrite
from fastsafe.safety.mixing.safety_rows import safety_rows_from

COLUMNS = ("source", "source_row", "safety_format", "mitigation", "expected")

_Source = tuple[Path, Sequence[Row], str]  # file, rows, and licence of rows that name none


@names_its_fields
@dataclass(frozen=True, kw_only=True)
class MixSettings:
    """Sources, mitigation and options of a mixture."""

    user: Path
    safety: Path
    out: Path
    mitigation: str = "paraphrase"
    share: float = 0.1  # safety rows, or tokens, as a fraction of the result
    tokenizer: str | None = None  # checkpoint whose tokenizer counts tokens; None counts rows
    task_format: str = ""  # format of the user's rows
    abstain: bool = False  # see `paraphrasing`
    rewriter: RewriterSettings | None = (
        None  # model that rewords the requests that ``mitigation`` dresses
    )
    behaviours: bool = False  # whether ``safety`` holds behaviours, which rows are made of
    seed: int = 0
    is_linted: bool = True
    user_licence: str = ""  # licence of rows that name none
    safety_licence: str = ""
    mapping: Mapping[str, str] | None = None  # column of the user's rows for each role


@dataclass(frozen=True)
class MixResult:
    """A written mixture and its statistics."""

    card: Path | None  # None where the rows went to a stream
    sha256: str  # of the file of rows
    counts: Mapping[str, int]  # number of user rows, and of safety rows by format
    reports: Mapping[Kind, Report]  # lint report of each source; empty where not linted
    notes: Sequence[str]
    worded: Mapping[str, int]  # safety rows by the reason a rewrite was rejected; "": accepted

    def record(self, settings: MixSettings) -> dict[str, Any]:
        """Return the JSON object that ``fastsafe mix --json`` prints."""
        num_user = self.counts["user"]
        return {
            "out": str(settings.out),
            "card": str(self.card) if self.card else None,
            "sha256": self.sha256,
            "rows": sum(self.counts.values()),
            "user_rows": num_user,
            "safety_rows": sum(self.counts.values()) - num_user,
            "safety_formats": {k: n for k, n in self.counts.items() if k != "user"},
            "mitigation": settings.mitigation,
            "seed": settings.seed,
            "worded_by_model": self.worded.get("", 0),
            "lint": {name: dict(report.rules) for name, report in self.reports.items()},
            "notes": list(self.notes),
        }


def mix(
    user: str | Path,
    safety: str | Path,
    out: str | Path,
    *,
    api_keys: Mapping[str, str] | None = None,
    **options: Any,
) -> MixResult:
    """Mix safety rows into a user's rows; `mix_files` with its settings as arguments.

    Args:
        user: File of the user's rows.
        safety: File of safety rows.
        out: JSONL file to write; its data card is written beside it.
        api_keys: As for `mix_files`.
        **options: Further fields of `MixSettings`, such as ``share=0.1`` or ``mitigation="plain"``.

    Raises:
        TypeError: An option is no field of `MixSettings`.
        FastsafeError: As for `mix_files`.
    """
    settings = MixSettings(user=Path(user), safety=Path(safety), out=Path(out), **options)
    return mix_files(settings, api_keys)


def mix_files(settings: MixSettings, api_keys: Mapping[str, str] | None = None) -> MixResult:
    """Lint both sets, mix them, and write the rows and their data card.

    Replies of a rewriter are cached in a folder beside the file, so that a second run asks nothing.
    A stream, such as ``-`` for standard output, gets the rows alone: no card, and no such folder.

    Args:
        settings: Sources, mitigation and options.
        api_keys: API keys by environment variable, for the endpoint of a rewriter.

    Raises:
        DataError: A file is malformed.
        UsageError: The mitigation is unknown or does not fit the options.
        CheckpointError: The checkpoint of the rewriter cannot be used.
        OSError: A file cannot be written; no partial file is left.
    """
    mitigation = _mitigation(settings)
    stream, card_path = atomic.stream_of(settings.out), None
    if stream is None:
        card_path = _card_path(settings)
    user, user_left_out = read_labelled_set(settings.user, settings.mapping)
    behaviours = read_behaviours(settings.safety) if settings.behaviours else None
    safety, safety_left_out = _safety_set(settings, behaviours)
    num_twins = sum(bool(each.harmful and each.benign) for each in behaviours or ())
    sources: dict[Kind, _Source] = {
        "user": (settings.user, user, settings.user_licence),
        "safety": (settings.safety, safety, settings.safety_licence),
    }
    reports = {
        kind: lint(rows, kind=kind, declared=Declared(licence=licence, has_twins=num_twins > 0))
        for kind, (_, rows, licence) in sources.items()
        if settings.is_linted
    }
    style = None if kind_of(user[0], "user row 0") == "text" else learn(user)
    notes = [f"{name}: {note}" for name, report in reports.items() for note in report.notes]
    for name, left_out in (("user", user_left_out), ("safety", safety_left_out)):
        notes += [f"{name}: columns left out: {', '.join(map(ascii, left_out))}"] * bool(left_out)
    if num_twins:
        notes.append(
            f"safety: {num_twins:,} benign twins have no answers and make no rows: measure "
            "over-refusal on them, with the file as data.behaviours of an audit"
        )
    pool = [{**_like(row, user), "source_row": i} for i, row in enumerate(safety)]
    if mitigation.restyle or mitigation.drawn_per_row > 1:
        pool = [row for row in pool if row.get("expected") != "comply"]
    labels = dict.fromkeys(map(format_of, pool))
    count_tokens = _counter(settings.tokenizer) if settings.tokenizer else None

    def mixed(rewrite: Rewrite | None) -> list[dict[str, Any]]:
        return _mitigation(settings, rewrite).mix(
            user,
            pooled(pool, longest_first=mitigation.drawn_per_row > 1),
            share=settings.share,
            task_format=settings.task_format,
            all_formats=list(labels),
            seed=settings.seed,
            count_tokens=count_tokens,
            repeat=True,
        )

    if settings.rewriter is None:
        rows = mixed(None)
    else:
        folder = settings.out.with_suffix(".replies") if stream is None else None
        rows = make_rewriter(settings.rewriter, api_keys=api_keys, folder=folder).apply(mixed)
    worded = Counter(row["flaw"] or "" for row in rows if row.get(WORDING))
    notes += _mixture_notes(rows, style, mitigation)
    notes += [
        f"{n:,} safety rows keep the template's wording: {flaw}"
        for flaw, n in sorted(worded.items())
        if flaw
    ]
    columns = (*COLUMNS, WORDING) if settings.rewriter else COLUMNS
    if any(row.get("tools") for row in rows):
        columns = ("tools", *columns)
    text = "".join(json.dumps(_written(row, columns), ensure_ascii=False) + "\n" for row in rows)
    counts = Counter(str(row["safety_format"] or "user") for row in rows)
    counts = Counter({"user": counts.pop("user", 0), **dict(sorted(counts.items()))})
    result = MixResult(
        card=card_path,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        counts=counts,
        reports=reports,
        notes=tuple(notes),
        worded=worded,
    )
    if stream is not None:
        atomic.write_through(stream, text.encode())
    if card_path is not None:
        atomic.write_text(settings.out, text)
        atomic.write_text(card_path, _card(settings, mitigation, result, sources))
    return result


def pooled(rows: Sequence[Row], *, longest_first: bool = False) -> SafetyRows:
    """Return a source of safety rows that draws from a file, without replacement.

    Args:
        rows: Safety rows with their labels; see `format_of`.
        longest_first: Draw the longest rows first; otherwise the seed orders them.
    """
    by_format: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_format[format_of(row)].append(row)

    def draw(format: str, n: int, seed: int) -> Sequence[Row]:
        drawn = list(by_format[format])
        random.Random(f"pool {format} {seed}").shuffle(drawn)
        if longest_first:
            drawn.sort(key=lambda row: sum(map(len, exchange_of(row, "safety row"))), reverse=True)
        return drawn[:n]

    return draw


def format_of(row: Row) -> str:
    """Return the format that the labels of a safety row name, "plain" if they name none."""
    return str(row.get("safety_format") or row.get("task_format") or row.get("format") or "plain")


def _card_path(settings: MixSettings) -> Path:
    """Return the path of the data card; both files must be writable and replace no source."""
    atomic.check_file(settings.out)
    card = settings.out.with_suffix(".card.md")
    atomic.check_file(card)
    sources = {path.resolve() for path in (settings.user, settings.safety)}
    if {settings.out.resolve(), card.resolve()} & sources:
        raise UsageError(f"--out: {settings.out} would replace a source; use another name")
    return card


def _safety_set(settings: MixSettings, behaviours: Sequence[Behaviour] | None) -> LabelledSet:
    """Return the safety rows of the file, or made of its behaviours."""
    if behaviours is None:
        return read_labelled_set(settings.safety)
    # every format that needs no translation
    ids = [name for name in formats() if name != "translation"]
    return LabelledSet(safety_rows_from(behaviours, ids, seed=settings.seed), ())


def _mitigation(settings: MixSettings, rewrite: Rewrite | None = None) -> Mitigation:
    registry = mitigations()
    if settings.mitigation not in registry:
        raise UsageError(
            f"--mitigation: it is {settings.mitigation!r}, expected one of {', '.join(registry)}"
        )
    option = "--abstain" if settings.abstain else "--rewriter" if settings.rewriter else ""
    if option and settings.mitigation in MODEL_WORDED:
        return paraphrasing(
            abstain=settings.abstain, rewrite=rewrite, known_styles=settings.mitigation == "mixed"
        )
    if option:
        raise UsageError(
            f"{option}: mitigation {settings.mitigation} dresses no row, expected "
            f"{' or '.join(MODEL_WORDED)}; leave it out"
        )
    mitigation = registry[settings.mitigation]
    if not settings.task_format and "" in mitigation.formats("", ("plain",)):
        raise UsageError(
            f"mitigation {mitigation.id}: the format of the user's rows is not known; give "
            "--task-format"
        )
    return mitigation


def _counter(checkpoint: str) -> CountTokens:
    """Return a function that counts the tokens of a row as encoded for training."""
    from fastsafe.io import hub
    from fastsafe.io.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(hub.resolve(checkpoint))
    return lambda row: len(encode_row(row, tokenizer).token_ids)


def _like(row: Row, user: Sequence[Row]) -> dict[str, Any]:
    """Return a safety row as the user's kind; for running text, which has no request, unchanged."""
    kind = kind_of(user[0], "user row 0")
    if kind == "text" or kind == kind_of(row, "safety row"):
        return dict(row)
    parts = ("messages", "prompt", "completion", "tools")
    labels = {key: row[key] for key in row if key not in parts}
    return {**labels, **as_row(exchange_of(row, "safety row"), kind)}


def _written(row: Row, columns: Sequence[str]) -> dict[str, Any]:
    """Return a row as it is written: its data and the same columns in every row."""
    data = {key: row[key] for key in ("messages", "prompt", "completion", "text") if key in row}
    return {**data, **{column: row.get(column) for column in columns}}


def _mixture_notes(rows: Sequence[Row], style: Style | None, mitigation: Mitigation) -> list[str]:
    notes = []
    safety = [row for row in rows if row["source"] == "safety"]
    drawn = Counter((row["source_row"], row["safety_format"]) for row in safety)
    max_uses = max(drawn.values(), default=0)
    if not max_uses and mitigation.formats("plain", ("plain",)):
        notes.append("the share rounds to no safety row: nothing was mixed in; raise it")
    elif max_uses > 1:
        notes.append(f"safety rows are too few: they are repeated, up to {max_uses} times each")
    if style is None:
        notes.append("the user's rows are running text: no style can be learned from them")
        return notes
    if style.channel in ("letter", "label", "number"):
        notes.append(
            f"the user's answers are of the kind {style.channel}, refusals are sentences: audit "
            "this format with its benign twins"
        )
    if mitigation.restyle and style.request_language not in ("", "en"):
        notes.append(
            f"the user's requests are in {style.request_language}: safety requests keep their own "
            "language, translate them first"
        )
    return notes


def _model(rewriter: RewriterSettings | None) -> str:
    """Return the name of the rewriter's model, without its folder."""
    if rewriter is None:
        return ""
    if rewriter.checkpoint:
        return Path(rewriter.checkpoint).name
    return str((rewriter.endpoint or {}).get("model"))


def _card(
    settings: MixSettings,
    mitigation: Mitigation,
    result: MixResult,
    sources: Mapping[Kind, _Source],
) -> str:
    """Render the data card; it holds no time and no folder: equal mixtures have equal cards."""
    from jinja2 import Template

    by = f"tokens of {Path(settings.tokenizer).name}" if settings.tokenizer else "rows"
    options = {
        "--mitigation": settings.mitigation,
        "--share": settings.share,
        "--by": "tokens" if settings.tokenizer else "",
        "--tokenizer": Path(settings.tokenizer).name if settings.tokenizer else "",
        "--task-format": settings.task_format,
        "--rewriter": _model(settings.rewriter),
        "--seed": settings.seed,
    }
    words = [f"{name} {value}" for name, value in options.items() if value != ""]
    words += ["--abstain"] * settings.abstain + ["--behaviours"] * settings.behaviours
    words += ["--no-lint"] * (not settings.is_linted)
    names = [settings.user.name, settings.safety.name, "--out", settings.out.name]
    template = files(__package__).joinpath("mixing.md").read_text(encoding="utf-8")
    card: str = Template(template, trim_blocks=True, keep_trailing_newline=True).render(
        settings=settings,
        mitigation=mitigation.id,
        result=result,
        version=fastsafe.__version__,
        command=" ".join([*names, *words]),
        by=by,
        sources=[
            (name, path.name, len(rows), file_sha256(path), _licence(rows, declared))
            for name, (path, rows, declared) in sources.items()
        ],
    )
    return card


def _licence(rows: Sequence[Row], declared: str) -> str:
    licences = {str(row.get("licence") or row.get("license") or declared) for row in rows}
    return ", ".join(sorted(licences - {""})) or "not stated"
