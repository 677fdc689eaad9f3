"""What the commands share: options with one meaning everywhere, and how they end and print."""

import os
import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, NoReturn

import typer

from fastsafe.errors import UsageError

EXIT_ERROR, EXIT_COVERAGE, EXIT_INTERRUPTED = 1, 3, 130


class Device(StrEnum):
    """Where a model runs."""

    CPU = "cpu"
    CUDA = "cuda"


class Dtype(StrEnum):
    """Of weights and activations."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Quantize(StrEnum):
    """How the base is held."""

    NF4 = "nf4"


class Backend(StrEnum):
    """What computes."""

    FASTSAFE = "fastsafe"
    TRANSFORMERS = "transformers"


Debug = Annotated[
    bool, typer.Option("--debug", envvar="FASTSAFE_DEBUG", help="Show tracebacks of errors.")
]
AsJson = Annotated[
    bool, typer.Option("--json", envvar="FASTSAFE_JSON", help="Print JSON for machines.")
]
ShowCompletions = Annotated[
    bool,
    typer.Option(
        "--show-completions",
        envvar="FASTSAFE_SHOW_COMPLETIONS",
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


def shown(value: Any) -> str:
    """Print a value on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {shown(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
