"""Bytes that no well-meaning endpoint sends: each is an error of its row, and none hangs."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from fastsafe.safety.completers.endpoint import Endpoint
from fastsafe.safety.completers.http import HttpCompleter
from fastsafe.safety.completers.protocol import Ask, Reply
from fastsafe_testing.loopback import skip_without_loopback

pytest.importorskip("httpx2")
pytest.importorskip("tenacity")

GOOD = b'{"choices": [{"message": {"content": "Sure."}, "finish_reason": "stop"}]}'
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


class RawServer:
    """Reads a request and answers it with bytes; ``drip`` is then sent again and again."""

    def __init__(self) -> None:
        self.head, self.drip, self.requests = b"", b"", 0
        self.ended = threading.Event()
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            data = b""
            while b"\r\n\r\n" not in data:
                data += connection.recv(65536)
            head, _, body = data.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            while length and len(body) < int(length[1]):
                body += connection.recv(65536)
            self.requests += 1
            connection.sendall(self.head)
            while self.drip and not self.ended.wait(0.01):
                connection.sendall(self.drip)


@pytest.fixture
def server() -> Iterator[RawServer]:
    skip_without_loopback()
    raw = RawServer()
    yield raw
    raw.ended.set()
    raw.socket.close()


def ask_at(server: RawServer, **options: Any) -> Reply:
    url = f"http://127.0.0.1:{server.port}/v1"
    settings: dict[str, Any] = {"timeout_s": 5.0, "max_retries": 0, **options}
    completer = HttpCompleter(Endpoint(url=url, model="m", **settings))
    (reply,) = completer.complete([Ask(key="1", messages=({"role": "user", "content": "?"},))])
    completer.close()
    return reply


@pytest.mark.parametrize(
    ("head", "drip"),
    [
        (OK + b"X-A: ", b"a"),
        (b"", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
        (OK + b"\r\n", b" "),
        (CHUNKED + b"1;", b"extension"),
        (CHUNKED + b"1\r\n \r\n0\r\nX-A: ", b"trailer"),
    ],
    ids=["headers", "hints", "continue", "body", "chunk", "trailer"],
)
def test_one_deadline_holds_for_all_that_drips(head: bytes, drip: bytes, server: RawServer) -> None:
    server.head, server.drip = head, drip
    reply = ask_at(server, timeout_s=0.1, max_retries=3)
    assert (reply.finish, reply.text) == ("error", "endpoint: reply took over 1 s")
    assert server.requests == 1  # whoever waited so long does not wait again


@pytest.mark.parametrize(
    "head",
    [
        b"",
        os.urandom(4000).replace(b"HTTP", b"") + b"\r\n\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\n",
        OK + b"X: y\r\n" * 100_000 + b"\r\n",
        OK + b"X: " + b"y" * 200_000 + b"\r\n\r\n" + GOOD,
        OK + b"X\x00: y\r\n\r\n" + GOOD,
        OK + b"Content-Length: 9\r\nContent-Length: 10\r\n\r\n" + GOOD,
        OK + b"Content-Length: -1\r\n\r\n" + GOOD,
        OK + b"Content-Length: 5000\r\n\r\n" + GOOD,
        OK + b"Content-Length: 12\r\n\r\n" + GOOD,
        CHUNKED + b"ffffffffffffffffffffff\r\n" + GOOD,
        CHUNKED + b"-1\r\n" + GOOD,
        CHUNKED + b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(GOOD), GOOD, b"X: y\r\n" * 100_000),
        OK + b"\r\n" + b" " * (5 << 20),
        OK + b"Content-Type: text/event-stream\r\n\r\ndata: " + GOOD + b"\n\ndata: [DONE]\n\n",
    ],
    ids=range(17),
)
def test_what_is_no_reply_is_an_error_of_the_row(head: bytes, server: RawServer) -> None:
    server.head = head
    reply = ask_at(server)
    assert reply.finish == "error"
    assert reply.text.startswith("endpoint: ")
    assert len(reply.text) < 400


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.0 200 OK\r\n\r\n" + GOOD,
        OK + b"Connection: close\r\n\r\n" + GOOD,
        OK + b"Content-Encoding: identity\r\n\r\n" + GOOD,
        CHUNKED + b"%x;name=value\r\n%b\r\n0\r\nX-Trailer: 1\r\n\r\n" % (len(GOOD), GOOD),
        b"HTTP/1.1 103 Early Hints\r\n\r\n" * 3 + OK + b"\r\n" + GOOD,
        b"HTTP/1.1 201 Created\r\n\r\n" + GOOD,
        OK + b"\r\n\xef\xbb\xbf" + GOOD,
    ],
    ids=["http/1.0", "close", "identity", "trailer", "hints", "201", "mark"],
)
def test_what_a_reply_may_look_like(head: bytes, server: RawServer) -> None:
    server.head = head
    assert ask_at(server).text == "Sure."


@pytest.mark.parametrize("encoding", ["gzip", "gzip, gzip", "deflate", "br", "zstd", "GZIP"])
def test_an_encoding_that_nobody_asked_for_is_refused_before_it_grows(
    encoding: str, server: RawServer
) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = packer.compress(b" " * (1 << 24)) + packer.flush()
    server.head = OK + f"Content-Encoding: {encoding}\r\n\r\n".encode() + bomb
    assert ask_at(server).text == f"endpoint: reply has the encoding {encoding!r}, expected none"


INTERRUPTED = """
import signal
import sys
from fastsafe.safety.completers.endpoint import Endpoint
from fastsafe.safety.completers.http import HttpCompleter
from fastsafe.safety.completers.protocol import Ask

# a test run in the background inherits an ignored SIGINT
signal.signal(signal.SIGINT, signal.default_int_handler)
completer = HttpCompleter(Endpoint(url=sys.argv[1], model="m"))
turns = [({"role": "user", "content": str(i)},) for i in range(20)]
try:
    completer.complete([Ask(key=str(i), messages=turn) for i, turn in enumerate(turns)])
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_ends_every_call_at_once(server: RawServer) -> None:
    """The endpoint drips for ten timeouts of a minute each; the test's own limit is far below."""
    server.head, server.drip = OK, b"X-A: a\r\n"
    url = f"http://127.0.0.1:{server.port}/v1"
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, url], stdout=subprocess.PIPE, text=True
    )
    while not server.requests and process.poll() is None:
        server.ended.wait(0.05)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "interrupted\n")


def test_a_caller_may_run_an_event_loop_itself(server: RawServer) -> None:
    """As a notebook does."""
    import asyncio

    server.head = OK + b"\r\n" + GOOD

    async def cell() -> Reply:
        return ask_at(server)

    assert asyncio.run(cell()).text == "Sure."
