"""A command whose options are variables of the environment, too, and whose errors are sentences."""

import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

import typer
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from typer.core import TyperCommand, TyperOption

from fastsafe.cli.options import (
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    EXIT_PIPE,
    EXIT_USAGE,
    Debug,
    Quiet,
    Verbose,
    echo,
    fail,
    remark,
    reporting,
)
from fastsafe.errors import FastsafeError, os_sentence, shown

PREFIX = "FASTSAFE_"
# Words whose options mean different things in different commands: their variables are
# FASTSAFE_<COMMAND>_<OPTION>. The variable of any other option is FASTSAFE_<OPTION>.
OWN_VARIABLES = {"batch-size", "limit", "out", "recipe"}


class Command(TyperCommand):
    """A command with a variable for each option, which may be given once unless it is repeatable.

    A flag that is off by default has no form ``--no-``; a repeatable option says that it is one.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for option in self.params:
            if not isinstance(option, TyperOption):
                continue
            word = max(option.opts, key=len).removeprefix("--")
            owner = f"{self.name}_" if word in OWN_VARIABLES else ""
            option.envvar = f"{PREFIX}{owner}{word}".replace("-", "_").upper()
            if option.default is False:
                option.secondary_opts = []
            if option.multiple:
                option.help = f"{option.help} Repeatable; in the variable, separate by ';'."
                option.callback = _split_values

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words of the command line; with --json, what is wrong is JSON, too."""
        as_json = "--json" in args  # of which the parser takes the words
        try:
            return self._parsed(ctx, args)
        except Exception as error:
            # typer's own class of these errors is private
            message = getattr(error, "format_message", None)
            if message is None or not as_json:
                raise
            fail(message(), EXIT_USAGE, as_json=True)

    def _parsed(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words; refuse a second value that would replace a first."""
        if not ctx.resilient_parsing:
            given: list[Any] = self.make_parser(ctx).parse_args(args=list(args))[2]
            for option in given:
                is_repeatable = not isinstance(option, TyperOption) or option.multiple
                if not is_repeatable and not option.is_flag and given.count(option) > 1:
                    ctx.fail(f"{option.opts[0]} is given twice, expected it once.")
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            if isinstance(error.__cause__, ValidationError):
                error.message = _in_our_words(error.__cause__.errors()[0])
            if choice := re.fullmatch(r"'(.*)' is not one of (.*)\.", error.message, re.DOTALL):
                known = re.findall(r"'([^']*)'", choice[2])
                if close := get_close_matches(choice[1], known, n=1):
                    error.message += f" Did you mean {close[0]}?"
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run the command; name variables that look misspelt first."""
        if not ctx.params.get("quiet"):
            known = set(_variables(ctx.find_root().command))
            for name in sorted(os.environ):
                if close := _meant(name, known, str(self.name)):
                    remark(f"warning: {name} sets no option; did you mean {close}?")
        return super().invoke(ctx)


def _in_our_words(error: ErrorDetails) -> str:
    """Return what is wrong with the value of an option."""
    from fastsafe.safety.completers.settings import expected

    words = expected(error)
    # an error of typer's own names the value itself
    return words if error["type"] == "value_error" else f"it is {shown(error['input'])}, {words}"


def _variables(command: Any) -> Iterator[str]:
    """Yield the variables of a command and of its subcommands."""
    for parameter in command.params:
        if isinstance(parameter.envvar, str):
            yield parameter.envvar
    for inner in getattr(command, "commands", {}).values():
        yield from _variables(inner)


def _meant(name: str, known: set[str], command: str) -> str | None:
    """Return the variable that a name of the environment misspells, None if it is not like one.

    Others, such as the key of an endpoint that a recipe names, are none of our business.
    """
    if not name.startswith(PREFIX) or name in known:
        return None
    word = name.removeprefix(PREFIX)
    own = f"{PREFIX}{command.upper()}_{word}"
    if own in known:
        return own
    words = [each.removeprefix(PREFIX) for each in known]
    owned = [each for each in words if each.endswith(f"_{word}")]
    close = owned or get_close_matches(word, words, n=1, cutoff=0.8)
    return PREFIX + sorted(close)[0] if close else None


def _split_values(ctx: Any, param: Any, values: Any) -> Any:
    """Split the values of a repeatable option from the environment at ';' and line ends.

    typer splits at spaces, which a value may hold.
    """
    source = ctx.get_parameter_source(str(param.name))
    if not values or source is None or source.name != "ENVIRONMENT":
        return values
    kind = type(values[0])
    return [kind(part) for part in re.split(r"[\n;]", os.environ[param.envvar]) if part.strip()]


def explained(command: Callable[..., None], *, error_code: int = EXIT_ERROR) -> Callable[..., None]:
    """Return a command that reports errors in one sentence on stderr and by its exit code.

    It has three more options: ``--quiet``, ``--verbose``, and ``--debug`` for the traceback.

    Args:
        command: A function whose parameters are options.
        error_code: Exit code of an error; a command whose 1 is an answer has 2.
    """

    @functools.wraps(command)
    def run(*, debug: bool, quiet: bool, verbose: bool, **options: Any) -> None:
        as_json = bool(options.get("as_json"))
        try:
            with reporting(quiet=quiet, verbose=verbose):
                command(**options)
                sys.stdout.flush()  # here, where a reader that is gone can be handled
        except (typer.Exit, typer.Abort):
            raise
        except BrokenPipeError:
            # nothing can be written any more, not even when Python exits
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(EXIT_PIPE) from None
        except KeyboardInterrupt as interrupt:
            echo(str(interrupt) or "interrupted", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except Exception as error:
            if debug:
                raise
            fail(_sentence(error), _exit_code(error, error_code), as_json=as_json)

    signature = inspect.signature(command)
    added = {"quiet": Quiet, "verbose": Verbose, "debug": Debug}
    parameters = [
        *signature.parameters.values(),
        *(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
            for name, kind in added.items()
        ),
    ]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


def _sentence(error: Exception) -> str:
    message = " ".join(str(error).split())
    if isinstance(error, FastsafeError):
        return message
    if isinstance(error, OSError) and error.errno is not None:
        return os_sentence(error)
    return f"{type(error).__name__}: {message}; run again with --debug for the traceback"


def _exit_code(error: BaseException | None, error_code: int) -> int:
    """Return the exit code of an error: a path that is not there is wrong usage, too."""
    code = max(error_code, getattr(error, "exit_code", EXIT_ERROR))
    while error is not None:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return EXIT_USAGE
        error = error.__cause__ or error.__context__
    return code
