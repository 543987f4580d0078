"""Looks at ranks as rows: written small, read back, and read although they are damaged or newer."""

from __future__ import annotations

import msgpack
import pytest

from traceml.database.flight.rings import pack_map
from traceml.database.looks import LOOK, FrameLook, GroupLook, ProcessLook, RankLook, ThreadLook, WorkerLook

LINE = FrameLook(file="train.py", line=28, function="main", is_user=True)
BLOCKER = ProcessLook(pid=5, name="ffmpeg", state="S", wchan="do_wait", waits_on="stdout")
FULL = RankLook(
    at_ns=7_000,
    rank=1,
    quiet_s=13.5,
    step=40,
    in_step=True,
    phase="backward",
    answered="recorder",
    frames=(FrameLook(file="torch/autograd/graph.py", line=800, function="_engine_run_backward"), LINE),
    user_line=LINE,
    process_state="S",
    cpu_share=0.25,
    groups=(GroupLook(members=(0, 1), number=15, operation="all_reduce", sizes=(2372,), in_flight=True),),
    workers=(WorkerLook(index=1, pid=77, state="S", waits_for_batch=2, frames=(LINE,), blocker=BLOCKER),),
    threads=(ThreadLook(name="upload", line=LINE, is_daemon=True),),
    blocker=BLOCKER,
)


def test_a_look_is_read_back_from_the_bytes_of_its_row():
    """All values survive the packing of a log row."""
    row = msgpack.unpackb(pack_map(FULL.to_info()))

    assert (row["kind"], row["t_ns"]) == (LOOK, 7_000)
    assert RankLook.from_row(row) == FULL


def test_values_that_are_not_known_are_left_out():
    """A poor look is a short row."""
    assert RankLook(at_ns=1, rank=3).to_info() == {"kind": LOOK, "t_ns": 1, "at_ns": 1, "rank": 3}


@pytest.mark.parametrize(
    ("damaged", "read"),
    [
        ({"rank": 2, "color": "red"}, RankLook(rank=2)),
        ({"rank": 2, "quiet_s": 5}, RankLook(rank=2, quiet_s=5.0)),
        ({"rank": 2, "quiet_s": "long", "step": True, "cpu_share": []}, RankLook(rank=2)),
        ({"rank": 2, "frames": "none", "groups": [3, {"number": 4}]}, RankLook(rank=2, groups=(GroupLook(number=4),))),
        ({"rank": 2, "user_line": [1], "workers": None}, RankLook(rank=2)),
        ({"rank": 2, "groups": [{"members": [0, "x", 1]}]}, RankLook(rank=2, groups=(GroupLook(members=(0, 1)),))),
    ],
)
def test_unknown_keys_and_values_of_another_type_are_ignored(damaged, read):
    """The rest of a damaged row is used."""
    assert RankLook.from_row(damaged) == read
