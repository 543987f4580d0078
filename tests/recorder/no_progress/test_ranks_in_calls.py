"""Sends and receives in a stack, told with the rank at the other end; and the roots of collectives."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest

from traceml.database.snapshots.rank_snapshot import GroupSnapshot
from traceml.recorder.no_progress.library_waits import called_collective, open_transfer, with_root

TORCH = "/site-packages/torch/distributed/distributed_c10d.py"
CODE = """
def send(tensor, dst=None, group=None):
    return here()

def recv(tensor, src=None, group=None):
    return here()

def recv_object_list(objects, src=None):
    return recv(objects, src)

def all_reduce(tensor):
    return here()

def broadcast(tensor, src=None, group=None, group_src=None):
    return here()

def broadcast_object_list(objects, src=None):
    return broadcast(objects, src)
"""


def here() -> FrameType:
    return sys._getframe()


def is_test(frame: FrameType) -> bool:
    return frame.f_code.co_filename == __file__ and frame.f_code.co_name != "here"


def functions(file: str) -> dict[str, Any]:
    """Return functions that torch has too, of a file."""
    found: dict[str, Any] = {"here": here}
    exec(compile(CODE, file, "exec"), found)
    return found


@pytest.mark.parametrize(
    ("call", "arguments", "operation", "peer"),
    [
        ("send", (None, 1), "send", 1),
        ("recv", (None, 0), "recv", 0),
        ("recv", (None,), "recv", None),
        ("recv_object_list", ([], 3), "recv_object_list", 3),
    ],
)
def test_the_call_of_the_user_and_its_peer_are_reported(
    call: str, arguments: tuple[Any, ...], operation: str, peer: int | None
) -> None:
    """The outermost function of torch; any sender may be meant."""
    snapshot = open_transfer(functions(f"/venv{TORCH}")[call](*arguments), is_test)

    assert snapshot is not None
    assert (snapshot.operation, snapshot.peer, snapshot.is_p2p, snapshot.in_flight) == (operation, peer, True, True)


def test_a_function_of_that_name_elsewhere_is_no_transfer() -> None:
    """Nor is a collective, or a stack without either."""
    assert open_transfer(functions("/home/me/mail.py")["send"](None, 1), is_test) is None
    assert open_transfer(functions(f"/venv{TORCH}")["all_reduce"](None), is_test) is None
    assert open_transfer(None, is_test) is None


@pytest.mark.parametrize(
    ("call", "arguments", "root"),
    [("broadcast", (None, 1), 1), ("broadcast", (None,), None), ("broadcast_object_list", ([], 0), 0)],
)
def test_the_root_of_a_collective_is_reported(call: str, arguments: tuple[Any, ...], root: int | None) -> None:
    """Of the operation that was called, and of no other; one that is given as a rank of the group is not known."""
    groups = [GroupSnapshot(operation=name, in_flight=True, number=3) for name in ("all_reduce", "broadcast")]
    frame = functions(f"/venv{TORCH}")[call](*arguments)

    assert [group.peer for group in with_root(groups, frame, is_test)] == [None, root]
    assert [group.peer for group in with_root([*groups, groups[1]], frame, is_test)] == [None, None, None]


@pytest.mark.parametrize(
    ("file", "call", "name"),
    [
        (f"/venv{TORCH}", "all_reduce", "all_reduce"),
        (f"/venv{TORCH}", "broadcast_object_list", "broadcast_object_list"),
        ("/home/me/mail.py", "broadcast", ""),
    ],
)
def test_the_collective_that_a_thread_has_called_is_told(file: str, call: str, name: str) -> None:
    """The outermost function of torch, as objects are sent in several; a function of that name elsewhere is none."""
    assert called_collective(functions(file)[call](None), is_test) == name
    assert called_collective(None, is_test) == ""
