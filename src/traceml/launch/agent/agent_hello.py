"""The agent's description of itself and its host, its first message."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

from traceml.clock import boot_id
from traceml.inspection.kernel_state import process_info
from traceml.launch.agent.machine import addresses, count_gpus
from traceml.launch.wire.payload_buffer import can_reach
from traceml.version import __version__

__all__ = ["hello"]

_VERSION = 1


def hello() -> dict[str, Any]:
    """Return the fields of the message."""
    connection = os.environ.get("SSH_CONNECTION", "").split()
    try:
        netns = str(Path("/proc/self/ns/net").readlink())
    except OSError:
        netns = ""

    return {
        "v": _VERSION,
        "pid": os.getpid(),
        "hostname": socket.gethostname(),
        "python": sys.version.split()[0],
        "executable": sys.executable,
        "cores": len(os.sched_getaffinity(0)),
        "address": connection[2] if len(connection) == 4 else None,
        "peer": connection[0] if len(connection) == 4 else None,
        "boot_id": boot_id(),
        "netns": netns,
        "addresses": list(addresses().values()),
        "gpus": count_gpus(os.environ),
        "near": (guard := process_info(os.getppid())) is not None and can_reach(guard.parent),
        "traceml": __version__,
    }
