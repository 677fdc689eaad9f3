"""Judges: one file per family, from a completion to a verdict with its evidence.

Another package adds judges by an entry point of the group ``fastsafe.judges`` that names a `Judge`.
A family that asks a model is configured by a mapping; `make_judge` lists its keys.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, create_model
from pydantic.dataclasses import dataclass

from fastsafe.data.thoughts import split
from fastsafe.errors import UsageError, nearest, shown
from fastsafe.io.template_variables import check_variables
from fastsafe.safety.completers.protocol import Completer
from fastsafe.safety.completers.settings import STRICT, from_mapping
from fastsafe.safety.judges._coherence import coherent
from fastsafe.safety.judges._model import ModelJudge, with_variables
from fastsafe.safety.judges._spec import (
    BatchJudge,
    Classifier,
    Item,
    Judge,
    JudgeFamily,
    answered,
)
from fastsafe.safety.plugins import collect, shipped_parts
from fastsafe.safety.verdict import Judgement, Verdict

__all__ = ["BatchJudge", "Item", "Judge", "configured", "families", "judge_all", "judges"]
__all__ += ["make_judge", "make_rewordings", "rows_to_calibrate", "unknown_judge"]

OpenCheckpoint = Callable[..., Completer]  # (path, dtype=, backend=) -> the model

MIN_WORDINGS = 3
_RUN_KEYS = ("calibrate", "wordings")  # of a run; they change no verdict
_LIMITS = {"threshold": Field(gt=0, lt=1), "max_chars": Field(ge=1)}


class _JudgeSettings(BaseModel):
    """Keys of every family's mapping; `_settings_of` adds the family's own."""

    model_config = STRICT

    kind: str
    id: str = ""
    checkpoint: Any = None
    endpoint: Any = None
    reply_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(check_variables)] = {}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class _CheckpointSettings:
    path: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    backend: Literal["fastsafe", "transformers"] = "fastsafe"


def families() -> dict[str, JudgeFamily]:
    """Return every family by its ``kind``: the files of this package."""
    return {family.id: family for family in shipped_parts(__name__, __path__, "FAMILY")}


def judges() -> dict[str, Judge]:
    """Return every judge without settings by id: those shipped, then those of entry points.

    Raises:
        UsageError: Two judges have one id, or an entry point names something else.

    Example:
        >>> judges()["refusal"].judge("", "# I can't help with that", harmful=True).verdict
        <Verdict.REFUSED: 'refused'>
    """
    shipped: list[Any] = [family.judge for family in families().values() if family.judge]
    return collect(shipped, "fastsafe.judges", Judge)


def make_judge(
    spec: str | Mapping[str, Any],
    *,
    open_checkpoint: OpenCheckpoint | None = None,
    api_keys: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Judge:
    """Build one judge from a recipe's entry.

    Args:
        spec: Name of a judge without settings, or a mapping: ``kind``, a family; ``id``, another
            name in reports; one of ``checkpoint`` (a path or hub id, or a mapping of ``path``,
            ``dtype`` and ``backend``) and ``endpoint`` (the keys of
            `safety.completers.endpoint.Endpoint`); ``reply_tokens``, the longest reply, which a
            model that thinks needs room in; ``chat_template_kwargs``, variables of the model's chat
            template, such as ``enable_thinking``; the family's options; and, for runs,
            ``wordings`` (`make_rewordings`) and ``calibrate`` (`rows_to_calibrate`).
        open_checkpoint: Returns the completer of a checkpoint, which is loaded at its first ask.
        api_keys: Environment variable -> key, for the ``api_key_env`` of endpoints; the caller
            reads the environment, since nothing here does.
        folder: Folder of the replies and spending of endpoints; None keeps them in memory.

    Raises:
        UsageError: A key is unknown, a value has a wrong type, or the model is missing.

    Example:
        >>> make_judge("refusal").id
        'refusal'
    """
    if isinstance(spec, str):
        if spec not in (known := judges()):
            raise UsageError(f"judge {shown(spec)}: no judge of this name; {unknown_judge(spec)}")
        return known[spec]
    settings = {key: value for key, value in spec.items() if key not in _RUN_KEYS}
    family, classifier, completer = configured(
        settings, open_checkpoint=open_checkpoint, api_keys=api_keys, folder=folder
    )
    if classifier is None or completer is None:
        raise UsageError(f"judge {family.id}: takes no settings, expected the name alone")
    return ModelJudge(classifier, completer, spec.get("id", ""))


def unknown_judge(name: str) -> str:
    """Return what to write instead of a name that is no judge's, as the end of a sentence."""
    if name in families():
        return f"it asks a model: write {{kind: {name}, checkpoint: ...}} or endpoint in its place"
    return nearest(name, judges())


def make_rewordings(spec: str | Mapping[str, Any], **options: Any) -> dict[str, Judge]:
    """Build a judge in several wordings, its own among them, as ``wordings`` of its mapping asks.

    The spread of their rates on one set of answers shows the effect of the wording.

    Args:
        spec: As for `make_judge`.
        options: As for `make_judge`.

    Returns:
        Wording -> judge, the judge's own first; empty where the mapping does not ask.

    Raises:
        UsageError: The family has too few wordings, or the wording is the user's.
    """
    if isinstance(spec, str) or "wordings" not in spec:
        return {}
    judge = make_judge(spec, **options)
    family, count = families()[spec["kind"]], spec["wordings"]
    if type(count) is not int or not MIN_WORDINGS <= count <= len(family.wordings):
        known = " or ".join(map(str, range(MIN_WORDINGS, len(family.wordings) + 1))) or "none"
        raise UsageError(
            f"judge {judge.id}: wordings is {count!r}, expected {known} with kind {family.id}"
        )
    if spec.get("template"):
        raise UsageError(f"judge {judge.id}: wordings and template are set, expected one of them")
    first = spec.get("wording", family.options["wording"])
    others = [wording for wording in family.wordings if wording != first][: count - 1]
    specs = {w: {**spec, "wording": w, "id": f"{judge.id}/{w}"} for w in others}
    return {first: judge} | {w: make_judge(spec, **options) for w, spec in specs.items()}


def rows_to_calibrate(spec: str | Mapping[str, Any]) -> int | None:
    """Return the number of labelled rows that a judge reads in a run, None for all.

    A judge without a model reads all. For one with a model, rows cost time or money: it reads as
    many as ``calibrate`` says, by default none.

    Raises:
        UsageError: ``calibrate`` is no number of rows.
    """
    if isinstance(spec, str):
        return None
    count = spec.get("calibrate", 0)
    if type(count) is not int or count < 0:
        raise UsageError(
            f"judge {spec.get('kind')}: calibrate is {count!r}, expected a number of rows, 0 or "
            "more"
        )
    return count


def configured(
    spec: Mapping[str, Any],
    *,
    open_checkpoint: OpenCheckpoint | None = None,
    api_keys: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> tuple[JudgeFamily, Classifier | None, Completer | None]:
    """Return the family, the classifier and the completer of a mapping; see `make_judge`.

    Classifier and completer are None for a family without a model.
    """
    known = families()
    kind = spec.get("kind", "")
    if not isinstance(kind, str) or kind not in known:
        raise UsageError(f"judge: kind is {shown(kind)}; {nearest(str(kind), known)}")
    family, location = known[kind], f"judge {kind}"
    settings = from_mapping(_settings_of(family), spec, location)
    if family.classifier is None:
        return family, None, None
    classifier = family.classifier(settings.model_dump(include=set(family.options)))
    if settings.reply_tokens is not None:
        classifier = classifier.with_reply_tokens(settings.reply_tokens)
    if settings.chat_template_kwargs:
        classifier = with_variables(classifier, settings.chat_template_kwargs)
    if (settings.checkpoint is None) == (settings.endpoint is None):
        raise UsageError(
            f"{location}: expected one of checkpoint and endpoint, which name its model"
        )
    if settings.checkpoint is None:
        from fastsafe.safety.completers.http import open_endpoint

        return family, classifier, open_endpoint(settings.endpoint, location, api_keys, folder)
    given = settings.checkpoint
    mapping = given if isinstance(given, Mapping) else {"path": given}
    checkpoint = from_mapping(_CheckpointSettings, mapping, f"{location}: checkpoint")
    if open_checkpoint is None:
        raise UsageError(f"{location}: a checkpoint cannot be opened here, expected an endpoint")
    completer = open_checkpoint(checkpoint.path, dtype=checkpoint.dtype, backend=checkpoint.backend)
    return family, classifier, completer


def _settings_of(family: JudgeFamily) -> type[_JudgeSettings]:
    """Return the settings class of a family: each option has its default's type and its limits."""
    options: dict[str, Any] = {
        name: (Annotated[type(default), _LIMITS.get(name, Field())], default)
        for name, default in family.options.items()
    }
    return create_model("_FamilySettings", __base__=_JudgeSettings, **options)


def judge_all(judge: Judge, items: Sequence[Item]) -> list[Judgement]:
    """Judge every item's answer, in the order given, with its coherence flag.

    Judges read completions without thoughts. One that was cut in its thought is ``truncated``, and
    no judge is asked about it.

    Raises:
        FastsafeError: The judge can judge no row at all: a rejected key, a missing checkpoint.

    Example:
        >>> row = Item(key="1", prompt="", completion="la " * 40, harmful=True)
        >>> judge_all(judges()["refusal"], [row])[0].coherent
        False
    """
    is_cut = [split(item.completion or "").is_cut for item in items]
    read = [answered(item) for item, cut in zip(items, is_cut, strict=True) if not cut]
    if isinstance(judge, BatchJudge):
        judgements = judge.judge_batch(read)
    else:
        judgements = [judge.judge(i.prompt, i.completion or "", i.harmful, i.format) for i in read]
    rest = iter(zip(read, judgements, strict=True))
    return [Judgement(Verdict.TRUNCATED, "") if cut else _flagged(*next(rest)) for cut in is_cut]


def _flagged(item: Item, judgement: Judgement) -> Judgement:
    return replace(judgement, coherent=coherent(item.completion or "", item.format))
