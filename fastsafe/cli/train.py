"""``fastsafe train``: fine-tune a base on data sets, to adapters or to whole models.

The options for settings are derived from the fields of ``TrainConfig`` and ``RunSettings``: type,
and help from the lines of their docstrings.
"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from fastsafe.cli.options import (
    AsJson,
    DryRun,
    ModelDevice,
    TemplateVariables,
    format_value,
    template_variables,
)
from fastsafe.commands.train_settings import TYPES, RunSettings
from fastsafe.errors import UsageError
from fastsafe.train.config import TrainConfig

if TYPE_CHECKING:
    from fastsafe.commands.train import TrainPlan

# settings whose option is not derived from type and name alone
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "batch_size": {"envvar": "FASTSAFE_TRAIN_BATCH_SIZE"},  # generate and audit have another one
    "checkpoint_every": {"min": 0},
    "drift_probes": {"metavar": "FILE"},
}


def _setting_options() -> Iterator[inspect.Parameter]:
    """Yield an option for every setting; its default None means that it is not given."""
    for name, hint in TYPES.items():
        if name in ("warmup_ratio", "chat_template_kwargs"):  # set by files, or by another option
            continue
        kinds = get_args(hint) or (hint,)
        kind = next((kind for kind in (bool, int, float) if kind in kinds), str)
        option = typer.Option(help=_HELP[name], **_EXCEPTIONS.get(name, {}))
        yield inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=None,
            annotation=Annotated[kind | None, option],
        )


def _attribute_docs(cls: type) -> dict[str, str]:
    """Return the lines about each field under "Attributes:" in the docstring of a dataclass."""
    section = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2]
    items = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in items}


_HELP = _attribute_docs(TrainConfig) | _attribute_docs(RunSettings)
_HELP["target_modules"] += " On the command line, names are separated by commas."
_HELP["objective"] += " On the command line, the mapping is JSON."


def train(
    base: Annotated[
        str, typer.Argument(help="Checkpoint folder, hub id or 'organism'.", show_default=False)
    ],
    data: Annotated[
        list[str],
        typer.Argument(
            help="Data sets: .jsonl, .json, .csv, .tsv or .parquet files, or hub ids "
            "(owner/name[:file]); a separate job is trained on each.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder; each job writes OUT/NAME.")] = Path("adapters"),
    preset: Annotated[
        str | None, typer.Option(help="Published set-up, paper1 or paper2; options override it.")
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
    device: ModelDevice = "cpu",
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
    import json

    from fastsafe import progress
    from fastsafe.commands import train
    from fastsafe.data.shapes import parse_mapping

    if chat_template_kwarg:
        settings["chat_template_kwargs"] = template_variables(chat_template_kwarg)
    modules, objective = settings["target_modules"], settings["objective"]
    if modules is not None and modules != "all-linear":
        settings["target_modules"] = tuple(word.strip() for word in modules.split(","))
    if objective is not None and objective.lstrip().startswith("{"):
        settings["objective"] = _json(objective)
    plan = train.plan(
        base,
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
        typer.echo(train.marked(first.encoded.examples[0], plan.tokenizer))
        return
    if dry_run and as_json:
        typer.echo(json.dumps(plan.describe()))
        return
    if not as_json:
        for line in lines(plan):
            typer.echo(line)
    if dry_run:
        return
    display = progress.for_terminal(as_json=as_json)
    announce = (lambda line: None) if as_json else typer.echo
    for result in train.execute(plan, out, display, resume=resume, announce=announce):
        if not as_json:
            facts = train.summary(result)
            typer.echo(
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
    for data in facts["data"]:
        share = data["trained_tokens"] / data["tokens"]
        text += [
            f"data: {data['source']}",
            f"  Mapping found: {data['mapping']}",
            f"  {data['tokens']:,} tokens, {share:.0%} of them trained; longest row "
            f"{data['longest']:,}; {data['truncated']:,} rows truncated",
        ]
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
