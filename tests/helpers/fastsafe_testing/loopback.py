"""Whether this machine can reach itself: in a network namespace of its own, ``lo`` may be down."""

import socket

import pytest


def skip_without_loopback() -> None:
    """Skip the test where no connection to 127.0.0.1 can be made."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        pytest.skip(f"needs the loopback interface, which is down here: {error}")
