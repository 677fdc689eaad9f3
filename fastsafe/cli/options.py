"""What the commands share: options with one meaning everywhere, and how they end and print."""

import json
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperCommand, TyperOption

from fastsafe.errors import UsageError

EXIT_ERROR, EXIT_COVERAGE, EXIT_INTERRUPTED = 1, 3, 130


Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "bfloat16", "float16"]
Quantize = Literal["nf4"]
Backend = Literal["fastsafe", "transformers"]  # what computes


class Command(TyperCommand):
    """A command whose every option is a variable, too, such as ``FASTSAFE_SEED``."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for each in self.params:
            if isinstance(each, TyperOption) and each.envvar is None:
                word = max(each.opts, key=len).removeprefix("--")
                each.envvar = f"FASTSAFE_{word.replace('-', '_').upper()}"


Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
CheckpointName = Annotated[str, typer.Argument(help="Checkpoint folder or hub id, or 'organism'.")]
Computes = Annotated[
    Backend,
    typer.Option(help="What computes; 'transformers' knows more architectures and is slower."),
]
BatchSize = Annotated[
    str, typer.Option(metavar="auto|N", help="Most prompts that are computed together.")
]
ShowCompletions = Annotated[
    bool,
    typer.Option(
        "--show-completions",
        help="Quote prompts and completions in report.html instead of redacting them.",
    ),
]


def parted(ctx: typer.Context, param: typer.CallbackParam, values: Any) -> Any:
    """Part the values of a repeatable option from the environment at ';' and line ends.

    typer parts texts at spaces, which they may hold.
    """
    source = ctx.get_parameter_source(str(param.name))
    if not values or source is None or source.name != "ENVIRONMENT":
        return values
    kind = type(values[0])
    return [
        kind(part) for part in re.split(r"[\n;]", os.environ[str(param.envvar)]) if part.strip()
    ]


def fail(message: str, exit_code: int) -> NoReturn:
    """Say why on stderr and exit."""
    typer.echo(message, err=True)
    raise typer.Exit(exit_code)


def batch_size_of(text: str) -> int | Literal["auto"]:
    """Read the value of --batch-size."""
    if text == "auto":
        return "auto"
    if text.isascii() and text.isdecimal() and int(text) >= 1:
        return int(text)
    raise UsageError(f"--batch-size: it is {text!r}, expected 'auto' or a number from 1")


def show(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print facts, a line each, or all as JSON."""
    if as_json:
        typer.echo(json.dumps(facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        typer.echo(f"{name.replace('_', ' '):<{width}}  {shown(value)}")


def shown(value: Any) -> str:
    """Print a value on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {shown(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
