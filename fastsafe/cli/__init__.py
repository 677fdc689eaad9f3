"""The command line: arguments in, exit code out; the rest is imported on first use.

A command is a function in a file of this package and a line of ``COMMANDS``.
"""

import functools
import inspect
import io
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

import fastsafe
from fastsafe.cli import audit, catalogue, generate, lint, mix, organism, train, verify
from fastsafe.cli.options import EXIT_ERROR, EXIT_INTERRUPTED, Command, Debug, fail
from fastsafe.errors import FastsafeError

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
}
ORGANISM_COMMANDS: dict[str, Callable[..., None]] = {
    "path": organism.organism_path,
    "build": organism.organism_build,
}


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGTERM, _interrupt)
    # a background job of a script inherits an ignored SIGINT and could not be interrupted
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a character that the terminal cannot show must not end a run
            stream.reconfigure(errors="replace")
    app()


def explained(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that reports errors in one sentence on stderr and by its exit code.

    It has one more option, ``--debug``, for the traceback.
    """

    @functools.wraps(command)
    def run(*, debug: bool, **options: Any) -> None:
        try:
            command(**options)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            fail("interrupted; run the same command to resume", EXIT_INTERRUPTED)
        except Exception as error:
            if debug:
                raise
            message = " ".join(str(error).split())
            if isinstance(error, FastsafeError):
                fail(f"error: {message}", error.exit_code)
            if isinstance(error, OSError) and error.filename is not None:
                fail(f"error: {error.filename}: {error.strerror}", EXIT_ERROR)
            kind = type(error).__name__
            fail(f"error: {kind}: {message}; run again with --debug for the traceback", EXIT_ERROR)

    signature = inspect.signature(command)
    added = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False)
    parameters = [*signature.parameters.values(), added.replace(annotation=Debug)]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


def _interrupt(signum: int, frame: object) -> NoReturn:
    """Handle SIGTERM like Ctrl-C, so that finished work is kept."""
    raise KeyboardInterrupt


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"fastsafe {fastsafe.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Measure, per task format, what fine-tuning does to a model's safety, and repair it."""


def _app() -> typer.Typer:
    app = typer.Typer(
        name="fastsafe",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    about = "The tiny model that ships with fastsafe."
    organism_app = typer.Typer(help=about, no_args_is_help=True)
    app.callback()(_root)
    for target, commands in ((app, COMMANDS), (organism_app, ORGANISM_COMMANDS)):
        for name, command in commands.items():
            target.command(name, cls=Command)(explained(command))
    app.add_typer(organism_app, name="organism")
    return app


app = _app()
