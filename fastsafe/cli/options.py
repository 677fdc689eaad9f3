"""Options that several commands share, and functions that print results and end a command."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperCommand, TyperOption

from fastsafe.errors import UsageError

EXIT_ERROR, EXIT_COVERAGE, EXIT_INTERRUPTED = 1, 3, 130

Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "bfloat16", "float16"]
Quantize = Literal["nf4"]
Backend = Literal["fastsafe", "transformers"]


class Command(TyperCommand):
    """A command whose options can also be set by variables, such as ``FASTSAFE_SEED``.

    A flag that is off by default has no form ``--no-``; a repeatable option says that it is one.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for option in self.params:
            if not isinstance(option, TyperOption):
                continue
            if option.envvar is None:
                name = max(option.opts, key=len).removeprefix("--")
                option.envvar = f"FASTSAFE_{name.replace('-', '_').upper()}"
            if option.default is False:
                option.secondary_opts = []
            if option.multiple:
                option.help = f"{option.help} Repeatable; in the variable, separate by ';'."
                option.callback = _split_values


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
CheckpointName = Annotated[str, typer.Argument(help="Checkpoint folder, hub id or 'organism'.")]
ComputeBackend = Annotated[
    Backend,
    typer.Option(help="Runtime; 'transformers' supports more architectures and is slower."),
]
BatchSize = Annotated[
    str, typer.Option(metavar="auto|N", help="Maximum number of prompts in a batch.")
]
DryRun = Annotated[bool, typer.Option(help="Print the plan and write nothing.")]
ModelDevice = Annotated[Device, typer.Option(help="Device that models run on.")]
ModelDtype = Annotated[Dtype, typer.Option(help="Dtype of weights and activations.")]
TemplateVariables = Annotated[
    list[str] | None,
    typer.Option(
        "--chat-template-kwarg",
        metavar="KEY=VALUE",
        help="Variable of the chat template, the value in YAML, such as enable_thinking=false.",
    ),
]
ShowCompletions = Annotated[
    bool,
    typer.Option(help="Quote prompts and completions in report.html instead of redacting them."),
]


def _split_values(ctx: Any, param: Any, values: Any) -> Any:
    """Split the values of a repeatable option from the environment at ';' and line ends.

    typer splits at spaces, which a value may hold.
    """
    source = ctx.get_parameter_source(str(param.name))
    if not values or source is None or source.name != "ENVIRONMENT":
        return values
    kind = type(values[0])
    return [kind(part) for part in re.split(r"[\n;]", os.environ[param.envvar]) if part.strip()]


def fail(message: str, exit_code: int) -> NoReturn:
    """Print an error to stderr and exit."""
    typer.echo(message, err=True)
    raise typer.Exit(exit_code)


def batch_size_of(text: str) -> int | Literal["auto"]:
    """Parse the value of --batch-size."""
    if text == "auto":
        return "auto"
    if text.isascii() and text.isdecimal() and int(text) >= 1:
        return int(text)
    raise UsageError(f"--batch-size: it is {text!r}, expected 'auto' or a number from 1")


def template_variables(words: Sequence[str]) -> dict[str, Any]:
    """Parse the values of --chat-template-kwarg.

    Raises:
        UsageError: A word has another form, a name is repeated or reserved, or a value is no JSON.
    """
    import yaml

    from fastsafe.io.template_variables import check_variables

    option = "--chat-template-kwarg"
    variables: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.strip().partition("=")
        if not equals or name in variables:
            problem = "is given twice" if equals else "has no value"
            raise UsageError(f"{option}: {name!a:.80} {problem}, expected KEY=VALUE once per key")
        try:
            variables[name] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise UsageError(
                f"{option}: {name!a:.80} has the value {value!a:.80}, expected YAML"
            ) from None
    return check_variables(variables, option)


def show(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print facts, one per line or as one JSON object."""
    if as_json:
        typer.echo(json.dumps(facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        typer.echo(f"{name.replace('_', ' '):<{width}}  {format_value(value)}")


def format_value(value: Any) -> str:
    """Format a value on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {format_value(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
