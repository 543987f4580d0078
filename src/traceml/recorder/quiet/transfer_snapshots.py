"""The send or receive that a thread waits in: torch's flight recorder has none of gloo's."""

from __future__ import annotations

from collections.abc import Callable
from types import FrameType

from traceml.database.snapshots import GroupSnapshot

__all__ = ["open_transfer"]

_FILE = "/torch/distributed/distributed_c10d.py"
_PEERS = {"send": "dst", "recv": "src", "send_object_list": "dst", "recv_object_list": "src"}
_MAX_DEPTH = 50


def open_transfer(frame: FrameType | None, is_user: Callable[[FrameType], bool]) -> GroupSnapshot | None:
    """Return the operation that the user's code has called, with the rank at its other end if that is an argument.

    Args:
        frame: what the thread runs.
        is_user: whether the user wrote the code of a frame.
    """
    found = None
    for _ in range(_MAX_DEPTH):
        if frame is None or is_user(frame):
            break

        name = frame.f_code.co_name
        if name in _PEERS and frame.f_code.co_filename.endswith(_FILE):
            peer = frame.f_locals.get(_PEERS[name])
            known = peer if type(peer) is int and peer >= 0 else None
            found = GroupSnapshot(operation=name, in_flight=True, is_p2p=True, peer=known)

        frame = frame.f_back

    return found
