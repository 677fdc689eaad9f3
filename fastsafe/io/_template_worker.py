"""Child process that renders chat templates; one JSON request per line in, one reply per line out.

A chat template is a program from a checkpoint. minijinja keeps it away from Python objects, files
and the network, and fuel ends its loops, but a few steps suffice to double a string until memory is
gone, which aborts the whole process. So templates run here, under a memory and a CPU limit.
"""

import json
import math
import resource
import signal
import sys
import time
from datetime import datetime
from functools import lru_cache
from typing import Any


class Refused(Exception):
    """The template called ``raise_exception``."""


def _limit(which: int, soft: int) -> None:
    """Lower the soft limit only, so that it can be raised again for the next request."""
    hard = resource.getrlimit(which)[1]
    resource.setrlimit(which, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _refuse(message: Any) -> None:
    raise Refused(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: list[str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Print ``value`` as transformers does: Jinja's own filter would escape HTML characters."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=(separators[0], separators[1]) if separators else None,
        sort_keys=sort_keys,
    )


def _is_iterable(value: Any) -> bool:
    """Answer as Jinja does; minijinja finds none iterable, which absent tools are."""
    return hasattr(value, "__iter__")


def _is_sequence(value: Any) -> bool:
    """Answer as Jinja does, for which texts and mappings are sequences, too."""
    return hasattr(value, "__len__") and hasattr(value, "__getitem__")


def _int(value: Any, default: int = 0, base: int = 10) -> int:
    """Return a number as Jinja does: the default for what is none."""
    try:
        return int(value, base) if isinstance(value, str) else int(value)
    except (TypeError, ValueError):
        try:
            return int(float(value))
        except (TypeError, ValueError, OverflowError):
            return default


class Renderer:
    """Compiles each template once and renders it with the clock of the request."""

    def __init__(self, fuel: int) -> None:
        self._fuel = fuel
        self._clock = datetime.min
        self._environment = lru_cache(maxsize=16)(self._compile)

    def _compile(self, source: str) -> Any:
        from minijinja import Environment

        environment = Environment(
            trim_blocks=True, lstrip_blocks=True, pycompat=True, fuel=self._fuel, debug=False
        )
        environment.add_global("raise_exception", _refuse)
        environment.add_global("strftime_now", lambda form: self._clock.strftime(form))
        environment.add_filter("tojson", _tojson)
        environment.add_filter("int", _int)
        environment.add_filter("python_title", str.title)
        environment.add_test("iterable", _is_iterable)
        environment.add_test("sequence", _is_sequence)
        environment.add_template("chat", source)
        return environment

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        """Render one request: {"text"}, {"refused": message} or {"error": message, "line"}."""
        self._clock = datetime.fromisoformat(request["clock"])
        try:
            environment = self._environment(request["source"])
            text = environment.render_template("chat", **request["variables"])
        except Refused as error:
            return {"refused": str(error)}
        except BaseException as error:  # Rust panics are not an Exception
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            return {"error": str(error), "line": getattr(error, "line", None)}
        return {"text": text} if len(text) <= request["max_chars"] else {"length": len(text)}


def main() -> None:
    """Answer requests until the parent closes the pipe. Arguments: bytes, CPU seconds, fuel."""
    memory, cpu_seconds, fuel = (int(argument) for argument in sys.argv[1:])
    renderer = Renderer(fuel)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    if sys.platform != "darwin":  # macOS has no such limit; CPU time still ends a bomb there
        _limit(resource.RLIMIT_AS, memory)
    _limit(resource.RLIMIT_CORE, 0)
    for line in sys.stdin.buffer:
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + cpu_seconds)
        reply = json.dumps(renderer.reply(json.loads(line)))
        sys.stdout.buffer.write(reply.encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
