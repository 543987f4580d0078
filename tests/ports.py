"""Ports for servers that start later, or never."""

from __future__ import annotations

import random
import socket

__all__ = ["free_port"]

# Below the ports that the kernel gives to connections and to servers without a port of their own, which would take one
# that is only looked up; and beside those of Ray's workers (10,002 to 19,999) and the defaults of torchrun, MLflow and
# ours.
_FIRST, _LAST = 20_000, 28_000
_own_choice = random.SystemRandom()  # tests seed the other one


def free_port() -> int:
    """Return a port of this host that nobody listens on, and that no other test is given until this process ends."""
    while True:
        port = _own_choice.randrange(_FIRST, _LAST)
        mark = socket.socket(socket.AF_UNIX)
        try:
            mark.bind(f"\0traceml-test-port-{port}")  # an abstract name: it leaves nothing behind
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            mark.close()
            continue

        mark.detach()  # it stays open as long as this process is there
        return port
