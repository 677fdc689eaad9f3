"""Options that several commands share, and how results, messages and errors are printed."""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from fastsafe.errors import UsageError, printable

if TYPE_CHECKING:
    from fastsafe.progress import Progress

EXIT_ERROR, EXIT_USAGE, EXIT_COVERAGE, EXIT_INTERRUPTED = 1, 2, 3, 130
EXIT_PIPE = 141  # as of a program that SIGPIPE ends

Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["nf4"]
Backend = Literal["fastsafe", "transformers"]

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print results and errors alone, no progress.")
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print what is loaded and chosen, too.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
CheckpointName = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT", help="Checkpoint folder, hub id, 'organism' or 'smollm2'."
    ),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter", metavar="NAME=PATH", help="PEFT folder; NAME= is its own name if left out."
    ),
]
ComputeBackend = Annotated[
    Backend,
    typer.Option(help="Runtime; 'transformers' supports more architectures and is slower."),
]
BatchSize = Annotated[
    str, typer.Option(metavar="auto|N", help="Maximum number of prompts in a batch.")
]
DryRun = Annotated[bool, typer.Option(help="Print the plan and write nothing.")]
ModelDevice = Annotated[
    str,
    typer.Option(
        metavar="auto|cpu|cuda[:N]",
        help="Device that models run on; auto is cuda if there is a GPU.",
        autocompletion=lambda: ["auto", "cpu", "cuda"],
    ),
]
ModelDtype = Annotated[Dtype, typer.Option(help="Dtype of weights and activations.")]
Quantize = Annotated[Quantization | None, typer.Option(help="nf4 holds the base in 4 bits.")]
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

_is_quiet: ContextVar[bool] = ContextVar("is_quiet", default=False)


class _Once(logging.Filter):
    """Lets each message pass once, as what reads a file may run for every model."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = printable(record.getMessage())
        is_new = message not in self._seen
        self._seen.add(message)
        prefix = "" if record.levelno < logging.WARNING else "warning: "
        record.msg, record.args = prefix + message, ()
        return is_new


@contextmanager
def reporting(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Set how much the command in this block prints to stderr.

    Raises:
        UsageError: Both are asked for.
    """
    if quiet and verbose:
        raise UsageError("--quiet and --verbose: both are given, expected one of them")
    logger = logging.getLogger("fastsafe")
    handler = logging.StreamHandler()
    handler.addFilter(_Once())
    before = logger.level
    token = _is_quiet.set(quiet)
    if not quiet:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if verbose else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        _is_quiet.reset(token)


def echo(text: str, *, err: bool = False) -> None:
    """Print text; what could control the terminal, such as in the name of a file, is escaped."""
    typer.echo(printable(text), err=err)


def display(*, as_json: bool = False) -> "Progress":
    """Return what shows the progress of this command: nothing if it is quiet."""
    from fastsafe import progress

    # events of --json are results of their own
    if _is_quiet.get() and not as_json:
        return progress.Progress()
    return progress.for_terminal(as_json=as_json)


def remark(message: str) -> None:
    """Print a remark to stderr unless the command is quiet."""
    if not _is_quiet.get():
        echo(message, err=True)


def announce_loading(checkpoint: str | None, *, as_json: bool) -> None:
    """Say on a terminal what is loaded, before torch is imported."""
    if sys.stderr.isatty() and not as_json:
        remark(f"loading {checkpoint or 'the model'} ...")


@contextmanager
def resumable(has_saved: Callable[[], bool]) -> Iterator[None]:
    """Say after Ctrl-C in this block whether the same command resumes."""
    try:
        yield
    except KeyboardInterrupt:
        then = "run the same command to resume" if has_saved() else "nothing was saved"
        raise KeyboardInterrupt(f"interrupted; {then}") from None


def fail(message: str, exit_code: int, *, as_json: bool = False) -> NoReturn:
    """Print an error to stderr, as a line or as a JSON object, and exit."""
    if as_json:
        typer.echo(json.dumps({"error": message, "exit_code": exit_code}), err=True)
    else:
        echo(f"error: {message}", err=True)
    raise typer.Exit(exit_code)


def warn_of_absent_device(device: str) -> None:
    """Say that a plan is for another machine if this one lacks the device.

    Raises:
        UsageError: The text names no device.
    """
    from fastsafe.model.device import check_device, choose_device

    chosen = choose_device(device)
    try:
        check_device(chosen)
    except UsageError as error:
        remark(f"warning: {error}; the plan is for another machine")


def batch_size_of(text: str) -> int | Literal["auto"]:
    """Parse the value of --batch-size."""
    if text == "auto":
        return "auto"
    if text.isascii() and text.isdecimal() and int(text) >= 1:
        return int(text)
    raise UsageError(f"--batch-size: it is {text!r}, expected 'auto' or a number from 1")


def adapter_paths(words: list[str] | None) -> dict[str, Path]:
    """Parse the values of --adapter: ``NAME=PATH``, or a path, whose folder gives the name."""
    adapters: dict[str, Path] = {}
    for word in words or ():
        name, _, path = word.strip().partition("=")
        # a path may hold '=', a name no '/'
        if "/" in name or Path(word).is_dir():
            path = word.strip()
            name = Path(path).resolve().name
        if not (name and path):
            raise UsageError(f"--adapter: it is {word!r}, expected NAME=PATH")
        if name in adapters:
            raise UsageError(f"--adapter: {name!r} is given twice, expected each name once")
        adapters[name] = Path(path)
    return adapters


def template_variables(words: Sequence[str]) -> dict[str, Any]:
    """Parse the values of --chat-template-kwarg.

    Raises:
        UsageError: A word has another form, a name is repeated or reserved, or a value is no JSON.
    """
    from fastsafe.io.template_variables import check_variables
    from fastsafe.yaml_file import parse_yaml

    option = "--chat-template-kwarg"
    variables: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.strip().partition("=")
        if not equals or name in variables:
            problem = "is given twice" if equals else "has no value"
            raise UsageError(f"{option}: {name!a:.80} {problem}, expected KEY=VALUE once per key")
        try:
            variables[name] = parse_yaml(value)
        except ValueError as error:
            raise UsageError(
                f"{option}: {name!a:.80} has the value {value!a:.80}, expected YAML: {error}"
            ) from None
    return check_variables(variables, option)


def show(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print facts, one per line or as one JSON object."""
    if as_json:
        typer.echo(json.dumps(facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        echo(f"{name.replace('_', ' '):<{width}}  {format_value(value)}")


def format_value(value: Any) -> str:
    """Format a value on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {format_value(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
