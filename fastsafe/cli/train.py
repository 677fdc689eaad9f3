"""``fastsafe train``: fine-tune a base on data sets, to adapters or to whole models.

The options for settings are derived from the fields of ``TrainConfig`` and ``RunSettings``: type,
and help from the lines of their docstrings.
"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from fastsafe.cli.options import (
    AsJson,
    CheckpointName,
    DryRun,
    ModelDevice,
    TemplateVariables,
    announce_loading,
    display,
    echo,
    format_value,
    resumable,
    template_variables,
    warn_of_absent_device,
)
from fastsafe.commands.train_settings import TYPES, RunSettings
from fastsafe.errors import UsageError
from fastsafe.train.config import TrainConfig

if TYPE_CHECKING:
    from fastsafe.commands.train import TrainPlan

# settings whose option is not derived from type and name alone
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "checkpoint_every": {"min": 0},
    "drift_probes": {"metavar": "FILE"},
}


def _setting_options() -> Iterator[inspect.Parameter]:
    """Yield an option for every setting; its default None means that it is not given."""
    for name, hint in TYPES.items():
        if name in ("warmup_ratio", "chat_template_kwargs"):  # set by files, or by another option
            continue
        kind = _option_type(hint)
        option = typer.Option(help=_HELP[name], **_EXCEPTIONS.get(name, {}))
        yield inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=None,
            annotation=Annotated[kind | None, option],
        )


def _option_type(hint: Any) -> Any:
    """Return the type of an option for a setting: its choices, a number, or else a text."""
    kinds = (hint,) if get_origin(hint) is Literal else get_args(hint) or (hint,)
    kinds = tuple(kind for kind in kinds if kind is not NoneType)
    if len(kinds) == 1 and get_origin(kinds[0]) is Literal:
        return kinds[0]
    return next((kind for kind in (bool, int, float) if kind in kinds), str)


def _attribute_docs(cls: type) -> dict[str, str]:
    """Return the lines about each field under "Attributes:" in the docstring of a dataclass."""
    section = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2]
    items = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in items}


_HELP = _attribute_docs(TrainConfig) | _attribute_docs(RunSettings)
_HELP["target_modules"] += " On the command line, names are separated by commas."
_HELP["objective"] += " On the command line, the mapping is JSON."


def train(
    checkpoint: CheckpointName,
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA",
            help="Data sets: .jsonl, .json, .csv, .tsv or .parquet files, or hub ids "
            "(owner/name[:file]); a separate job is trained on each.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FOLDER", help="Folder; each job writes OUT/NAME."),
    ] = Path("adapters"),
    preset: Annotated[
        str | None,
        typer.Option(
            help="Published set-up, see 'fastsafe list presets'; options override it.",
            autocompletion=lambda: ["paper1", "paper2"],
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file of settings; options override it.", metavar="FILE"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the job [default: the file's].")] = None,
    seeds: Annotated[
        str | None,
        typer.Option(help="Seeds separated by commas: one job for each, trained together."),
    ] = None,
    safety_data: Annotated[
        str | None, typer.Option(help="Safety rows to mix in.", metavar="FILE")
    ] = None,
    column_map: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="ROLE=KEY",
            help="Roles of the columns: user and assistant (and system), prompt and completion, "
            "messages, or text.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Maximum number of rows per data set.", min=1)
    ] = None,
    chat_template_kwarg: TemplateVariables = None,
    device: ModelDevice = "auto",
    resume: Annotated[
        bool,
        typer.Option("--resume/--no-resume", help="Resume what was begun, or train it again."),
    ] = True,
    dry_run: DryRun = False,
    show_example: Annotated[
        bool, typer.Option(help="Print one row with its trained tokens, and exit.")
    ] = False,
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """Fine-tune a base on data sets. Each data set and seed is a job; all are trained together.

    Exit codes: 0 done, 1 error, 2 usage, 130 interrupted.
    """
    announce_loading(checkpoint, as_json=as_json)
    import json

    from fastsafe.commands import train
    from fastsafe.data.shapes import parse_mapping

    if chat_template_kwarg:
        settings["chat_template_kwargs"] = template_variables(chat_template_kwarg)
    modules, objective = settings["target_modules"], settings["objective"]
    if modules is not None and modules != "all-linear":
        settings["target_modules"] = tuple(word.strip() for word in modules.split(","))
    if objective is not None and objective.lstrip().startswith("{"):
        settings["objective"] = _json(objective)
    if dry_run:
        warn_of_absent_device(device)
    plan = train.plan(
        checkpoint,
        data,
        settings,
        name=name,
        preset=preset,
        config_file=config,
        seeds=_seeds(seeds),
        mapping=parse_mapping(column_map) if column_map else None,
        safety_data=safety_data,
        limit=limit,
        device=device,
    )
    if show_example:
        first = plan.data[0]
        example = first.encoded.examples[0]
        if as_json:
            parts = train.example_parts(example, plan.tokenizer)
            marks = [{"text": text, "trained": is_trained} for is_trained, text in parts]
            typer.echo(json.dumps({"example": marks}))
        else:
            echo(train.marked(example, plan.tokenizer))
        if first.encoded.unknown_text:
            echo(f"note: {first.encoded.unknown_text}", err=True)
        return
    if dry_run and as_json:
        typer.echo(json.dumps(plan.describe()))
        return
    if not as_json:
        for line in lines(plan):
            echo(line)
    if dry_run:
        return
    shown = display(as_json=as_json)
    announce = (lambda line: None) if as_json else echo
    with resumable(lambda: train.has_begun(plan, out)):
        results = train.execute(plan, out, shown, resume=resume, announce=announce)
    for result in results:
        if not as_json:
            facts = train.summary(result)
            echo(
                f"{facts['path']}: {facts['steps']} steps, {facts['tokens']:,} tokens, "
                f"loss {facts['first_loss']:.3f} to {facts['last_loss']:.3f}"
                + (", stopped early as it drifted too far" if facts["stopped_early"] else "")
            )


def _with_settings(signature: inspect.Signature) -> inspect.Signature:
    """Return the signature with an option for each setting in place of ``**settings``."""
    *named, _ = signature.parameters.values()
    at = [parameter.name for parameter in named].index("safety_data")
    return signature.replace(parameters=[*named[:at], *_setting_options(), *named[at:]])


train.__signature__ = _with_settings(inspect.signature(train))  # type: ignore[attr-defined]


def lines(plan: "TrainPlan") -> list[str]:
    """Return the plan as text."""
    facts = plan.describe()
    text = [f"base: {facts['base']} on {facts['device']}", *facts["preset"], "settings:"]
    width = max(map(len, facts["settings"]))
    for key, setting in facts["settings"].items():
        text.append(f"  {key:<{width}}  {_format_setting(setting['value'])}  ({setting['origin']})")
    for data, source in zip(facts["data"], plan.data, strict=True):
        share = data["trained_tokens"] / data["tokens"]
        text += [
            f"data: {data['source']}",
            f"  Mapping found: {data['mapping']}",
            f"  {data['tokens']:,} tokens, {share:.0%} of them trained; longest row "
            f"{data['longest']:,}; {data['truncated']:,} rows truncated",
        ]
        if source.encoded.unknown_text:
            text.append(f"  {source.encoded.unknown_text}")
    for job in facts["jobs"]:
        text.append(
            f"job {job['name']}: {job['rows']:,} rows, {job['steps']:,} steps, "
            f"{job['warmup_steps']:,} of warm-up, seed {job['seed']}"
        )
    memory = facts["memory"]
    text.append(
        f"memory: {memory['bytes_per_job'] / 2**20:,.1f} MiB per job for "
        f"{memory['parameters_per_job']:,} trained parameters"
    )
    return text


def _format_setting(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else format_value(value)


def _seeds(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() for word in words) or len(set(words)) < len(
        words
    ):
        raise UsageError(f"--seeds: it is {text!r}, expected different numbers such as 0,1,2")
    return tuple(map(int, words))


def _json(text: str) -> Any:
    import json

    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"--objective: {text!r:.80} is not JSON ({error})") from None
