"""The send or receive that a thread waits in: torch's flight recorder has none of gloo's."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from types import FrameType

from traceml.database.snapshots import GroupSnapshot
from traceml.inspection.thread_frames import stack_frames

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
    for each in takewhile(lambda each: not is_user(each), stack_frames(frame, _MAX_DEPTH)):
        name = each.f_code.co_name
        if name in _PEERS and each.f_code.co_filename.endswith(_FILE):
            peer = each.f_locals.get(_PEERS[name])
            known = peer if type(peer) is int and peer >= 0 else None
            found = GroupSnapshot(operation=name, in_flight=True, is_p2p=True, peer=known)

    return found
