"""A completer and an endpoint that a test scripts."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fastsafe.safety.completers.endpoint import Endpoint
from fastsafe.safety.completers.http import HttpCompleter
from fastsafe.safety.completers.protocol import Ask, Reply
from fastsafe_testing.loopback import skip_without_loopback


@dataclass
class Scripted:
    """Answers each ask by a function of it: a text, odds of the labels, or a whole reply."""

    answer: Callable[[Ask], Any]
    seen: list[Ask] = field(default_factory=list)

    @property
    def identity(self) -> str:
        return hashlib.sha256(b"scripted").hexdigest()

    def complete(self, asks: Sequence[Ask]) -> list[Reply]:
        self.seen += asks
        replies = []
        for ask in asks:
            said = self.answer(ask)
            if isinstance(said, str):
                said = Reply(key=ask.key, text=said)
            elif isinstance(said, tuple):
                said = Reply(key=ask.key, logprobs=said)
            replies.append(said)
        return replies


@pytest.fixture
def scripted() -> type[Scripted]:
    return Scripted


USAGE = {"prompt_tokens": 10, "completion_tokens": 5}


def chat(text: Any, finish: str = "stop", **message: Any) -> dict[str, Any]:
    choice = {"message": {"content": text, **message}, "finish_reason": finish}
    return {"choices": [choice], "usage": USAGE}


class Fake:
    """A server that answers its n-th call by ``script(n, body)``: (status, headers, bytes)."""

    def __init__(self) -> None:
        self.script: Callable[[int, dict[str, Any]], Any] = lambda n, body: chat("Sure.")
        self.calls: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.date = ""  # the server's clock; "" is the true one
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    n = len(fake.calls)
                    fake.calls.append({"path": self.path, **body})
                    fake.headers.append(dict(self.headers))
                    fake.at_once += 1
                    fake.most_at_once = max(fake.most_at_once, fake.at_once)
                answer = fake.script(n, body)
                with fake.lock:
                    fake.at_once -= 1
                if answer is None:
                    self.close_connection = True
                    return
                if isinstance(answer, dict):
                    answer = (200, {}, json.dumps(answer).encode())
                status, headers, data = answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if "Content-Length" not in headers:
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
                self.close_connection = "Content-Length" in headers

            def date_time_string(self, timestamp: float | None = None) -> str:
                return fake.date or super().date_time_string()  # type: ignore[arg-type]

            def log_message(self, *args: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *args: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def fake() -> Iterator[Fake]:
    skip_without_loopback()
    server = Fake()
    yield server
    server.close()


Make = Callable[..., HttpCompleter]


@pytest.fixture
def make(fake: Fake, waits: list[float]) -> Iterator[Make]:
    made: list[HttpCompleter] = []

    def build(folder: Path | None = None, api_key: str = "", **options: Any) -> HttpCompleter:
        target = Endpoint(url=fake.url, **{"model": "m", "timeout_s": 5.0, **options})
        completer = HttpCompleter(target, api_key=api_key, folder=folder, sleep=waits.append)
        made.append(completer)
        return completer

    yield build
    for completer in made:
        completer.close()


@pytest.fixture
def waits() -> list[float]:
    """Seconds that were waited; nothing really waits."""
    return []
