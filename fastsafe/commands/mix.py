"""Mix two data sets into a file, with a card that says what is in it."""

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
from fastsafe.audit.plan.rewriting import make_writer
from fastsafe.audit.recipe.schema import Rewriter
from fastsafe.commands.lint import read_labelled_rows
from fastsafe.data.conversation import Row, kind_of
from fastsafe.data.exchange import as_row, exchange_of
from fastsafe.data.packing import encode_row
from fastsafe.data.tables import file_sha256
from fastsafe.errors import UsageError
from fastsafe.io import atomic
from fastsafe.safety.behaviours import read_behaviours
from fastsafe.safety.formats import formats
from fastsafe.safety.lint import Declared, Report, lint
from fastsafe.safety.mixing.learned_style import Style, learn
from fastsafe.safety.mixing.mitigations import (
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


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """What is mixed, and how."""

    user: Path
    safety: Path
    out: Path
    mitigation: str = "paraphrase"
    share: float = 0.1  # of the rows, or tokens, of the result that are safety's
    tokenizer: str | None = None  # checkpoint whose tokens are counted; None counts rows
    task_format: str = ""  # of the user's rows
    abstain: bool = False  # see `paraphrasing`
    rewriter: Rewriter | None = None  # words the requests that ``mitigation`` dresses
    behaviours: bool = False  # whether ``safety`` holds behaviours, to be made into rows
    seed: int = 0
    is_linted: bool = True
    user_licence: str = ""  # of rows that name none
    safety_licence: str = ""


@dataclass(frozen=True)
class Mixture:
    """A mixture that was written."""

    card: Path
    sha256: str  # of the rows' file
    counts: Mapping[str, int]  # user rows, and safety rows of each format
    reports: Mapping[str, Report]  # of each source, when linted
    notes: Sequence[str]
    worded: Mapping[str, int]  # safety rows by why a model's wording was not taken; "": it was

    def record(self, mixing: Mixing) -> dict[str, Any]:
        """Return the mixture as ``fastsafe mix --json`` prints it."""
        num_user = self.counts["user"]
        return {
            "out": str(mixing.out),
            "card": str(self.card),
            "sha256": self.sha256,
            "rows": sum(self.counts.values()),
            "user_rows": num_user,
            "safety_rows": sum(self.counts.values()) - num_user,
            "safety_formats": {k: n for k, n in self.counts.items() if k != "user"},
            "mitigation": mixing.mitigation,
            "seed": mixing.seed,
            "worded_by_model": self.worded.get("", 0),
            "lint": {name: dict(report.rules) for name, report in self.reports.items()},
            "notes": list(self.notes),
        }


def mix_files(mixing: Mixing, api_keys: Mapping[str, str] | None = None) -> Mixture:
    """Lint both sets, mix them, and write the rows and their card.

    A rewriter's replies are kept in a folder beside the file: what was said is not asked again.

    Args:
        mixing: What to do.
        api_keys: Keys of a rewriter's endpoint, by the name of their environment variable.

    Raises:
        DataError: A file is malformed.
        UsageError: The mitigation is unknown or asks for what is not there.
        CheckpointError: The rewriter's checkpoint cannot be used.
        OSError: A file cannot be written; nothing half-written stays.
    """
    mitigation = _mitigation(mixing)
    card_path = mixing.out.with_suffix(".card.md")
    if {mixing.out.resolve(), card_path.resolve()} & {
        path.resolve() for path in (mixing.user, mixing.safety)
    }:
        raise UsageError(f"--out: {mixing.out} would replace a source; use another name")
    user = read_labelled_rows(mixing.user)
    safety = _from_behaviours(mixing) if mixing.behaviours else read_labelled_rows(mixing.safety)
    reports: dict[str, Report] = {}
    if mixing.is_linted:
        said = Declared(licence=mixing.user_licence), Declared(licence=mixing.safety_licence)
        reports = {
            "user": lint(user, kind="user", declared=said[0]),
            "safety": lint(safety, kind="safety", declared=said[1]),
        }
    style = None if kind_of(user[0], "user row 0") == "text" else learn(user)
    notes = [f"{name}: {note}" for name, each in reports.items() for note in each.notes]
    pool = [{**_like(row, user), "source_row": i} for i, row in enumerate(safety)]
    if mitigation.restyle or mitigation.drawn_per_row > 1:
        pool = [row for row in pool if row.get("expected") != "comply"]
    labels = dict.fromkeys(map(format_of, pool))
    count_tokens = _counter(mixing.tokenizer) if mixing.tokenizer else None

    def mixed(rewrite: Rewrite | None) -> list[dict[str, Any]]:
        return _mitigation(mixing, rewrite).mix(
            user,
            pooled(pool, longest_first=mitigation.drawn_per_row > 1),
            share=mixing.share,
            task_format=mixing.task_format,
            all_formats=list(labels),
            seed=mixing.seed,
            count_tokens=count_tokens,
            repeat=True,
        )

    if mixing.rewriter is None:
        rows = mixed(None)
    else:
        folder = mixing.out.with_suffix(".replies")
        writer = make_writer(mixing.rewriter, api_keys=api_keys, folder=folder)
        rows = writer.written(mixed)
    worded = Counter(row["flaw"] or "" for row in rows if row.get(WORDING))
    notes += _mixture_notes(rows, style, mitigation)
    notes += [
        f"{n:,} safety rows keep the template's wording: {flaw}"
        for flaw, n in sorted(worded.items())
        if flaw
    ]
    columns = (*COLUMNS, WORDING) if mixing.rewriter else COLUMNS
    text = "".join(json.dumps(_written(row, columns), ensure_ascii=False) + "\n" for row in rows)
    counts = Counter(str(row["safety_format"] or "user") for row in rows)
    counts = Counter({"user": counts.pop("user", 0), **dict(sorted(counts.items()))})
    done = Mixture(
        card=card_path,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        counts=counts,
        reports=reports,
        notes=tuple(notes),
        worded=worded,
    )
    sources = {
        "user": (mixing.user, user, mixing.user_licence),
        "safety": (mixing.safety, safety, mixing.safety_licence),
    }
    atomic.write_text(mixing.out, text)
    atomic.write_text(card_path, _card(mixing, mitigation, done, sources))
    return done


def pooled(rows: Sequence[Row], *, longest_first: bool = False) -> SafetyRows:
    """Return rows of a file as a source of safety rows: at most all of a format, none twice.

    Args:
        rows: Each in the format that its ``safety_format`` names, "plain" without one.
        longest_first: Order them by length; otherwise the seed orders them.
    """
    by_format: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_format[format_of(row)].append(row)

    def draw(format: str, n: int, seed: int) -> Sequence[Row]:
        found = list(by_format[format])
        random.Random(f"pool {format} {seed}").shuffle(found)
        if longest_first:
            found.sort(key=lambda row: sum(map(len, exchange_of(row, "safety row"))), reverse=True)
        return found[:n]

    return draw


def format_of(row: Row) -> str:
    """Return the format that a safety row says it is in, "plain" where it says none."""
    return str(row.get("safety_format") or row.get("task_format") or row.get("format") or "plain")


def _mitigation(mixing: Mixing, rewrite: Rewrite | None = None) -> Mitigation:
    known = mitigations()
    if mixing.mitigation not in known:
        raise UsageError(
            f"--mitigation: it is {mixing.mitigation!r}, expected one of {', '.join(known)}"
        )
    option = "--abstain" if mixing.abstain else "--rewriter" if mixing.rewriter else ""
    if option and mixing.mitigation in MODEL_WORDED:
        return paraphrasing(
            abstain=mixing.abstain, rewrite=rewrite, known_styles=mixing.mitigation == "mixed"
        )
    if option:
        raise UsageError(
            f"{option}: mitigation {mixing.mitigation} dresses no row, expected "
            f"{' or '.join(MODEL_WORDED)}; leave it out"
        )
    found = known[mixing.mitigation]
    if not mixing.task_format and "" in found.formats("", ("plain",)):
        raise UsageError(
            f"mitigation {found.id}: the format of the user's rows is not known; give --task-format"
        )
    return found


def _from_behaviours(mixing: Mixing) -> list[dict[str, Any]]:
    """Make safety rows in every format that needs no translation."""
    ids = [name for name in formats() if name != "translation"]
    return safety_rows_from(read_behaviours(mixing.safety), ids, seed=mixing.seed)


def _counter(checkpoint: str) -> CountTokens:
    """Return a function that counts the tokens that a row is trained with."""
    from fastsafe.audit.sources.registry import checkpoint_of
    from fastsafe.io.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(checkpoint_of(checkpoint))
    return lambda row: len(encode_row(row, tokenizer).token_ids)


def _like(row: Row, user: Sequence[Row]) -> dict[str, Any]:
    """Return a safety row as the user's kind; running text has no request, so the row stays."""
    kind = kind_of(user[0], "user row 0")
    if kind == "text" or kind == kind_of(row, "safety row"):
        return dict(row)
    labels = {key: row[key] for key in row if key not in ("messages", "prompt", "completion")}
    return {**labels, **as_row(exchange_of(row, "safety row"), kind)}


def _written(row: Row, columns: Sequence[str]) -> dict[str, Any]:
    """Return what the file holds of a row: the same columns in every one."""
    data = {key: row[key] for key in ("messages", "prompt", "completion", "text") if key in row}
    return {**data, **{column: row.get(column) for column in columns}}


def _mixture_notes(rows: Sequence[Row], style: Style | None, mitigation: Mitigation) -> list[str]:
    notes = []
    drawn = Counter(
        (row["source_row"], row["safety_format"]) for row in rows if row["source"] == "safety"
    )
    most = max(drawn.values(), default=0)
    if not most and mitigation.formats("plain", ("plain",)):
        notes.append("the share rounds to no safety row: nothing was mixed in; raise it")
    elif most > 1:
        notes.append(f"safety rows are too few: they are repeated, up to {most} times each")
    if style is None:
        notes.append("the user's rows are running text: no style can be learned from them")
        return notes
    if style.channel in ("letter", "label", "number"):
        notes.append(
            f"the user's answers are of the kind {style.channel}, refusals are sentences: audit "
            "this format with its benign twins"
        )
    foreign = style.request_language not in ("", "en")
    if mitigation.restyle and foreign:
        notes.append(
            f"the user's requests are in {style.request_language}: safety requests keep their own "
            "language, translate them first"
        )
    return notes


def _model(rewriter: Rewriter | None) -> str:
    """Name of the model that words, without its folder."""
    if rewriter is None:
        return ""
    if rewriter.checkpoint:
        return Path(rewriter.checkpoint).name
    return str((rewriter.endpoint or {}).get("model"))


def _card(
    mixing: Mixing,
    mitigation: Mitigation,
    done: Mixture,
    sources: Mapping[str, tuple[Path, Sequence[Row], str]],
) -> str:
    """Data card in Markdown; no time and no folder, so that the same mixture has the same card."""
    from jinja2 import Template

    by = f"tokens of {Path(mixing.tokenizer).name}" if mixing.tokenizer else "rows"
    options = {
        "--mitigation": mixing.mitigation,
        "--share": mixing.share,
        "--by": "tokens" if mixing.tokenizer else "",
        "--tokenizer": Path(mixing.tokenizer).name if mixing.tokenizer else "",
        "--task-format": mixing.task_format,
        "--rewriter": _model(mixing.rewriter),
        "--seed": mixing.seed,
    }
    words = [f"{name} {value}" for name, value in options.items() if value != ""]
    words += ["--abstain"] * mixing.abstain + ["--behaviours"] * mixing.behaviours
    words += ["--no-lint"] * (not mixing.is_linted)
    names = [mixing.user.name, mixing.safety.name, "--out", mixing.out.name]
    template = files(__package__).joinpath("mixing.md").read_text(encoding="utf-8")
    card: str = Template(template, trim_blocks=True, keep_trailing_newline=True).render(
        mixing=mixing,
        mitigation=mitigation.id,
        done=done,
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
    held = {str(row.get("licence") or row.get("license") or declared) for row in rows}
    return ", ".join(sorted(held - {""})) or "not stated"
