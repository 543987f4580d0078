"""Snapshots of ranks as rows: written small, read back, and read although they are damaged or newer."""

from __future__ import annotations

import msgpack
import pytest

from traceml.database.flight.row_rings import pack_map
from traceml.database.snapshots.rank_snapshot import (
    SNAPSHOT,
    FrameSnapshot,
    GroupSnapshot,
    ProcessSnapshot,
    RankSnapshot,
    ThreadSnapshot,
    WorkerSnapshot,
)

LINE = FrameSnapshot(file="train.py", line=28, function="main", is_user=True)
BLOCKER = ProcessSnapshot(pid=5, name="ffmpeg", state="S", wchan="do_wait", waits_on="stdout")
FULL = RankSnapshot(
    at_ns=7_000,
    rank=1,
    quiet_s=13.5,
    step=40,
    in_step=True,
    phase="backward",
    answered="recorder",
    frames=(FrameSnapshot(file="torch/autograd/graph.py", line=800, function="_engine_run_backward"), LINE),
    user_line=LINE,
    process_state="S",
    cpu_share=0.25,
    groups=(GroupSnapshot(members=(0, 1), number=15, operation="all_reduce", sizes=(2372,), in_flight=True),),
    workers=(WorkerSnapshot(index=1, pid=77, state="S", waits_for_batch=2, frames=(LINE,), blocker=BLOCKER),),
    threads=(ThreadSnapshot(name="upload", line=LINE, is_daemon=True),),
    blocker=BLOCKER,
)


def test_a_snapshot_is_read_back_from_the_bytes_of_its_row():
    """All values survive the packing of a log row."""
    row = msgpack.unpackb(pack_map(FULL.to_info()))

    assert (row["kind"], row["t_ns"]) == (SNAPSHOT, 7_000)
    assert RankSnapshot.from_row(row) == FULL


def test_values_that_are_not_known_are_left_out():
    """A poor snapshot is a short row."""
    assert RankSnapshot(at_ns=1, rank=3).to_info() == {"kind": SNAPSHOT, "t_ns": 1, "at_ns": 1, "rank": 3}


@pytest.mark.parametrize(
    ("damaged", "read"),
    [
        ({"rank": 2, "color": "red"}, RankSnapshot(rank=2)),
        ({"rank": 2, "quiet_s": 5}, RankSnapshot(rank=2, quiet_s=5.0)),
        ({"rank": 2, "quiet_s": "long", "step": True, "cpu_share": []}, RankSnapshot(rank=2)),
        (
            {"rank": 2, "frames": "none", "groups": [3, {"number": 4}]},
            RankSnapshot(rank=2, groups=(GroupSnapshot(number=4),)),
        ),
        ({"rank": 2, "user_line": [1], "workers": None}, RankSnapshot(rank=2)),
        (
            {"rank": 2, "groups": [{"members": [0, "x", 1]}]},
            RankSnapshot(rank=2, groups=(GroupSnapshot(members=(0, 1)),)),
        ),
    ],
)
def test_unknown_keys_and_values_of_another_type_are_ignored(damaged, read):
    """The rest of a damaged row is used."""
    assert RankSnapshot.from_row(damaged) == read


@pytest.mark.parametrize(
    ("usage", "is_busy"),
    [
        ({"cpu_share": 0.2}, True),
        ({"io_bytes_per_s": 10_000.0}, True),
        ({"cpu_share": 0.19, "io_bytes_per_s": 9_999.0}, False),
        ({}, False),
    ],
)
def test_a_rank_that_computes_or_transfers_is_busy_by_itself(usage, is_busy):
    """The rank that takes the snapshot, another process that does, and the one that judges it agree."""
    assert RankSnapshot(**usage).is_busy_itself is is_busy
