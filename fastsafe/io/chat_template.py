"""Chat templates: the checkpoint's own Jinja program that turns messages into the text of a prompt.

Rendered by minijinja in a child process with limits on steps, memory, CPU time and output, so that
a template of an unknown origin can neither reach this process nor exhaust it.
"""

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastsafe.errors import TokenizerError, shown
from fastsafe.io.template_source import for_minijinja

# The present time inside a template. Llama 3.x prints the date into every system prompt, and the
# same prompt must have the same tokens tomorrow; this is the date they print without a clock.
FROZEN_CLOCK = datetime(2024, 7, 26)

MAX_SOURCE_CHARS = 1 << 20
MAX_OUTPUT_CHARS = 16 << 20
FUEL = 5_000_000  # steps; 200 turns through the longest published templates take under 2 million
MEMORY_BYTES = 512 << 20  # address space of the child, Python itself included
CPU_SECONDS = 2  # per rendering

_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and the special tokens it may print.

    Raises:
        TokenizerError: The source is longer than 1 Mi characters.
    """

    source: str
    special_tokens: Mapping[str, str]  # the variables bos_token, eos_token, ...

    def __post_init__(self) -> None:
        if len(self.source) > MAX_SOURCE_CHARS:
            raise TokenizerError(
                f"chat template: source is {len(self.source)} characters, expected at most "
                f"{MAX_SOURCE_CHARS}; use the template that the model's authors publish"
            )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Render the conversation as transformers' ``apply_chat_template`` does.

        Args:
            messages: Turns with "role" and "content", oldest first.
            add_generation_prompt: Whether to open the assistant's turn at the end.
            **variables: More template variables such as ``tools`` or ``enable_thinking``.

        Raises:
            TokenizerError: The template is malformed, refuses the conversation or exceeds a limit,
                a message is not plain data, or minijinja is not installed.
        """
        if not messages:
            raise TokenizerError("chat template: messages is empty, expected one turn or more")
        request = {
            "source": for_minijinja(self.source),
            "clock": FROZEN_CLOCK.isoformat(),
            "max_chars": MAX_OUTPUT_CHARS,
            "variables": {
                "tools": None,  # transformers defines these two even without any
                "documents": None,
                **self.special_tokens,
                **variables,
                "messages": [_normalise(message) for message in messages],
                "add_generation_prompt": add_generation_prompt,
            },
        }
        try:
            line = json.dumps(request, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise TokenizerError(
                f"chat template: messages are not plain data ({error}), expected Unicode text, "
                "numbers, lists and dicts; convert them first"
            ) from None
        return _text(_WORKER.ask(line))


def _normalise(message: Mapping[str, Any]) -> dict[str, Any]:
    """Drop unset keys and give the reasoning both of the names that published templates read."""
    if not isinstance(message, Mapping):
        raise TokenizerError(
            f"chat template: a message is {type(message).__name__}, expected a dict with role and "
            "content; pass a list of such dicts"
        )
    normal = {name: value for name, value in message.items() if value is not None}
    if "tool_calls" in normal:
        normal.setdefault("content", "")
    reasoning = next((normal[name] for name in _REASONING if name in normal), None)
    if reasoning is not None:
        normal = {"thinking": reasoning, **normal, "reasoning_content": reasoning}
    return normal


def _text(reply: Mapping[str, Any] | None) -> str:
    if reply is None:
        raise TokenizerError(
            f"chat template: rendering needed more than {MEMORY_BYTES >> 20} MiB or {CPU_SECONDS} "
            "seconds of CPU time, expected a template that prints the conversation; use the "
            "template that the model's authors publish"
        )
    if "refused" in reply:
        raise TokenizerError(
            f"chat template: the conversation is refused ({shown(reply['refused'], 200)}), "
            "expected the roles and the order that this model knows; change the messages"
        )
    if "length" in reply:
        raise TokenizerError(
            f"chat template: the output is {reply['length']} characters, expected at most "
            f"{MAX_OUTPUT_CHARS}; use the template that the model's authors publish"
        )
    if "error" in reply:
        place = f"line {reply['line']}" if reply["line"] else "the template"
        raise TokenizerError(
            f"chat template: {place} is refused ({shown(reply['error'], 200)}), expected a "
            "template that renders within its limits; use the one that the model's authors publish"
        )
    return str(reply["text"])


class _Worker:
    """The child process; started on first use, restarted after it died or this process forked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, line: bytes) -> dict[str, Any] | None:
        """Send one request and return the reply, or None when a limit ended the child."""
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self._stop()  # ended from outside, between two requests
            process = self._process or self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                with suppress(BrokenPipeError):
                    process.stdin.write(line + b"\n")
                    process.stdin.flush()
                reply = process.stdout.readline()
            except BaseException:  # an interrupt would leave a reply for the next request to read
                self._stop()
                raise
            if not reply.endswith(b"\n"):
                self._stop()
                return None
            answer: dict[str, Any] = json.loads(reply)
            return answer

    def _start(self) -> subprocess.Popen[bytes]:
        if find_spec("minijinja") is None:
            raise TokenizerError(
                "chat template: minijinja is not installed, expected version 3.0.5 or later; "
                "run `pip install minijinja` or pass prompts that are already rendered"
            )
        script = Path(__file__).with_name("_template_worker.py")
        limits = (str(MEMORY_BYTES), str(CPU_SECONDS), str(FUEL))
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script), *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        return self._process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with suppress(BrokenPipeError):
                process.communicate()

    def close(self) -> None:
        """End the child, if there is one."""
        with self._lock:
            self._stop()

    def forget(self) -> None:
        """Leave the child to the parent process after a fork."""
        self._lock = threading.Lock()
        process, self._process = self._process, None
        if process is not None:
            process.returncode = 0  # not ours to wait for
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


_WORKER = _Worker()
atexit.register(_WORKER.close)
os.register_at_fork(after_in_child=_WORKER.forget)
