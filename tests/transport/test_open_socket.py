"""The socket of a rank to its aggregator."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from traceml.transport.client_handshake import open_socket

CONNECTS = """
import sys
from traceml.transport.client_handshake import open_socket
open_socket(sys.argv[1], int(sys.argv[2]), 10.0).close()
print("encodings.idna" in sys.modules)
"""


@pytest.mark.process
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_no_codec_of_international_names_is_loaded(host: str) -> None:
    """A rank that connects does without its tables."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [sys.executable, "-c", CONNECTS, host, str(listener.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)

    assert (done.stdout, done.stderr) == ("False\n", "")


def test_the_timeout_stays_for_the_handshake() -> None:
    """Whoever listens and says nothing does not hold up a rank."""
    with socket.create_server(("127.0.0.1", 0)) as listener, open_socket("127.0.0.1", _port(listener), 3.5) as sock:
        assert sock.gettimeout() == 3.5


def test_a_closed_port_refuses() -> None:
    """The error is the system's, and no socket stays open."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionRefusedError):
            open_socket("127.0.0.1", _port(bound), 3.5)


def _port(listener: socket.socket) -> int:
    return int(listener.getsockname()[1])
