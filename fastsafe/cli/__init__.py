"""The command line: arguments in, exit code out; the rest is imported on first use.

A command is a function in a file of this package and a line of ``COMMANDS``.
"""

import codecs
import inspect
import io
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, NoReturn

import typer

import fastsafe
from fastsafe.cli import audit, catalogue, fetch, generate, lint, mix, organism, train, verify
from fastsafe.cli.command import Command, explained
from fastsafe.cli.options import EXIT_ERROR, EXIT_USAGE, echo
from fastsafe.errors import os_sentence

COMMANDS: dict[str, Callable[..., None]] = {
    "audit": audit.audit,
    "report": audit.report,
    "judge": audit.judge,
    "generate": generate.generate,
    "verify": verify.verify,
    "mix": mix.mix,
    "lint": lint.lint,
    "train": train.train,
    "list": catalogue.list_parts,
    "inspect": catalogue.inspect,
    "fetch": fetch.fetch,
}
ORGANISM_COMMANDS: dict[str, Callable[..., None]] = {
    "path": organism.organism_path,
    "build": organism.organism_build,
}
CHECKS = ("lint", "verify")  # their exit code 1 is an answer: findings, or a difference

EXIT_CODES = (
    "Exit codes: 0 done; 1 error (lint: findings, verify: a difference); 2 wrong usage, such as an "
    "unknown option or a path that is not there (lint and verify: any error); 3 too few answers "
    "could be judged; 130 interrupted; 141 the reader of a pipe is gone."
)
# what a terminal without Unicode shows instead of a question mark
_ASCII = {
    "\N{UPWARDS ARROW}": "^",
    "\N{DOWNWARDS ARROW}": "v",
    "\N{RIGHTWARDS ARROW}": ">",
    "\N{HORIZONTAL ELLIPSIS}": "...",
    "\N{EN DASH}": "-",
    "\N{MULTIPLICATION SIGN}": "x",
}


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGTERM, _interrupt)
    # a background job of a script inherits an ignored SIGINT and could not be interrupted
    signal.signal(signal.SIGINT, signal.default_int_handler)
    codecs.register_error("legible", _legible)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a character that the terminal cannot show must not end a run
            stream.reconfigure(errors="legible")
    try:
        try:
            app()
        finally:
            if sys.stdout:
                sys.stdout.flush()
    except OSError as error:  # of the help, which is printed outside of any command
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        echo(f"error: {os_sentence(error)}", err=True)
        raise SystemExit(EXIT_ERROR) from None


def _interrupt(signum: int, frame: object) -> NoReturn:
    """Handle SIGTERM like Ctrl-C, so that finished work is kept."""
    raise KeyboardInterrupt


def _legible(error: UnicodeError) -> tuple[str, int]:
    """Write characters that a stream cannot encode in ASCII."""
    assert isinstance(error, UnicodeEncodeError), "it is set for output alone"
    unknown = error.object[error.start : error.end]
    return "".join(_ASCII.get(character, "?") for character in unknown), error.end


def _print_version(is_asked: bool) -> None:
    if is_asked:
        echo(f"fastsafe {fastsafe.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            "-V",
            callback=_print_version,
            is_eager=True,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    """Measure, per task format, what fine-tuning does to a model's safety, and repair it."""


def _app() -> typer.Typer:
    app = typer.Typer(
        name="fastsafe",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    about = "The tiny model that ships with fastsafe."
    organism_app = typer.Typer(help=about, no_args_is_help=True)
    app.callback(help=f"{inspect.getdoc(_root)}\n\n{EXIT_CODES}")(_root)
    for target, commands in ((app, COMMANDS), (organism_app, ORGANISM_COMMANDS)):
        for name, command in commands.items():
            error_code = EXIT_USAGE if name in CHECKS else EXIT_ERROR
            target.command(name, cls=Command)(explained(command, error_code=error_code))
    app.add_typer(organism_app, name="organism")
    return app


app = _app()
