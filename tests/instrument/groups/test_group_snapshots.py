"""Two real ranks over gloo: the newest operation by group, in flight or not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.forked import client as forked
from traceml.instrument.groups import group_snapshots
from traceml.instrument.groups.group_snapshots import GroupSnapshots

_SCRIPT = """
import json, sys
import torch, torch.distributed as dist
from traceml.instrument.groups.group_snapshots import GroupSnapshots, mesh_coordinates

rank, store = int(sys.argv[1]), sys.argv[2]
snapshots = GroupSnapshots()
before = [snapshots.read(), snapshots.state(), mesh_coordinates()]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
ones = torch.ones(4, 2)
for _ in range(3):
    dist.all_reduce(ones)
pair = dist.new_group([0, 1], group_desc="pair")
unused = dist.new_group([0, 1], group_desc="unused")
state = snapshots.state()
if rank == 0:
    work = dist.all_reduce(ones, group=pair, async_op=True)
    found = snapshots.read()
    changed = state != snapshots.state()
    dist.barrier()
else:
    found, changed = snapshots.read(), state != snapshots.state()
    dist.barrier()
    work = dist.all_reduce(ones, group=pair, async_op=True)
work.wait()
print(json.dumps({
    "before": before, "found": [each.to_row() for each in found], "changed": changed, "mesh": mesh_coordinates(),
}))
dist.destroy_process_group()
"""


_MESH = """
import json, sys
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from traceml.instrument.groups.group_snapshots import mesh_coordinates

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4)
init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("pp", "tp", "ep"))
for members in ([0, 2], [1, 3]):
    dist.new_group(members, group_desc="DATA_PARALLEL_GROUP")
found = mesh_coordinates()
dist.barrier()
print(json.dumps(found))
dist.destroy_process_group()
"""


def _answers(script: str, world_size: int, folder: Path) -> list[Any]:
    """Run a script as each rank of a group; return the JSON that each printed."""
    file = folder / "groups.py"
    file.write_text(script)
    processes = [
        forked.Popen(
            [sys.executable, str(file), str(rank), str(folder / "store")],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    answers = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0] * world_size, answers
    return [json.loads(out) for out, _ in answers]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The answers of both ranks: rank 0 is in a collective of a sub-group, rank 1 is not."""
    return _answers(_SCRIPT, 2, tmp_path_factory.mktemp("groups"))


@pytest.mark.process
def test_a_rank_in_a_sub_groups_collective_is_told_from_one_that_is_not(ranks: list[dict[str, Any]]) -> None:
    """Each group's newest number, operation and sizes; no members, as these groups have all ranks."""
    done = {"number": 3, "operation": "all_reduce", "sizes": [8]}

    assert ranks[0]["found"] == [
        done,
        {"name": "pair", "number": 1, "operation": "all_reduce", "sizes": [8], "in_flight": True},
        {"name": "unused"},
    ]
    assert ranks[1]["found"] == [done, {"name": "pair"}, {"name": "unused"}]


@pytest.mark.process
def test_a_collective_changes_the_state(ranks: list[dict[str, Any]]) -> None:
    """It is progress, and only the rank that issued one has made it."""
    assert [rank["changed"] for rank in ranks] == [True, False]


@pytest.mark.process
def test_without_groups_there_is_nothing_to_read(ranks: list[dict[str, Any]]) -> None:
    """Neither before a process group nor without torch."""
    assert ranks[0]["before"] == [[], None, {}]


@pytest.mark.process
def test_the_place_in_a_mesh_is_that_in_the_groups_of_its_dimensions(tmp_path: Path) -> None:
    """By the names of DeviceMesh and of Megatron; a dimension of one rank tells nothing, and other groups are none."""
    answers = _answers(_MESH, 4, tmp_path)

    assert answers == [{"pp": rank // 2, "tp": rank % 2, "dp": rank // 2} for rank in range(4)]


@pytest.mark.process
def test_groups_of_other_names_are_no_mesh(ranks: list[dict[str, Any]]) -> None:
    """Groups that the script makes for itself."""
    assert [rank["mesh"] for rank in ranks] == [{}, {}]


def test_an_import_that_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorder's thread may ask while the script imports torch.distributed, which has no functions yet."""
    monkeypatch.setitem(sys.modules, "torch.distributed", ModuleType("torch.distributed"))
    snapshots = GroupSnapshots()

    assert snapshots.state() is None
    assert snapshots.read() == ()


class _Group:
    """A process group that has issued some collectives."""

    group_desc = ""
    issued = 3

    def _get_sequence_number_for_group(self) -> int:
        return self.issued


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of torch's flight recorder, without a function yet, of rank 0 of two groups of three ranks."""
    distributed, c10d, recorder = (ModuleType(name) for name in ("distributed", "c10d", "recorder"))
    distributed.is_initialized = lambda: True  # type: ignore[attr-defined]
    world, pair = _Group(), _Group()
    c10d._world = SimpleNamespace(  # type: ignore[attr-defined]
        pg_names={world: "0", pair: "1"}, pg_group_ranks={world: {0: 0, 1: 1, 2: 2}, pair: {2: 1, 0: 0}}
    )
    monkeypatch.setitem(sys.modules, "torch.distributed", distributed)
    monkeypatch.setitem(sys.modules, "torch.distributed.distributed_c10d", c10d)
    monkeypatch.setitem(sys.modules, "torch._C._distributed_c10d", recorder)
    return recorder


def test_members_are_those_of_a_part_of_the_ranks(recorder: Any) -> None:
    """A job of 10,000 ranks would send 300 MB of members."""
    assert [each.members for each in GroupSnapshots().read()] == [(), (0, 2)]


def test_a_default_group_of_a_part_of_the_job_has_members(recorder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As each of two trainings in one job: the ranks of the other one are not waited for."""
    monkeypatch.setenv("WORLD_SIZE", "6")

    assert [each.members for each in GroupSnapshots().read()] == [(0, 1, 2), (0, 2)]


@pytest.mark.parametrize(
    ("entries", "number", "operation", "flies"),
    [
        (["all_reduce", "all_reduce"], 2, "all_reduce", False),
        (["all_reduce", "broadcast*", "all_reduce*", "all_gather*"], 2, "broadcast", True),
        (["broadcast*", "all_reduce", "all_gather*"], 3, "all_gather", True),  # nobody waits for the first one
        (["broadcast*", "all_reduce"], 2, "all_reduce", False),
        (["send*", "all_reduce*"], 2, "all_reduce", True),
    ],
)
def test_the_first_of_the_collectives_in_flight_is_the_one_that_is_waited_for(
    recorder: Any, entries: list[str], number: int, operation: str, flies: bool
) -> None:
    """As of the buckets of DDP: a rank in another collective has met the first, and never comes to the last of them."""
    rows = [
        {
            "record_id": at,
            "process_group": ["0", "default_pg"],
            "collective_seq_id": at,
            "profiling_name": f"gloo:{name.removesuffix('*')}",
            "retired": not name.endswith("*"),
            "is_p2p": name.startswith("send"),
        }
        for at, name in enumerate(entries, 1)
    ]
    recorder._dump_fr_trace_json = lambda *_: json.dumps({"entries": rows[::-1]})

    found, _ = GroupSnapshots().read()

    assert (found.number, found.operation, found.in_flight) == (number, operation, flies)


def test_a_collective_changes_the_state_where_the_recorder_would_ask_the_device(
    recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in each build of torch for CUDA: the counters of the groups are read instead, and snapshots are anew."""
    dumps: list[bool] = []
    recorder._dump_nccl_trace_json = lambda *_: dumps.append(True) or "{}"
    snapshots = GroupSnapshots()
    before = snapshots.state()
    monkeypatch.setattr(_Group, "issued", 4)

    assert before != snapshots.state()
    assert not dumps
    snapshots.read()
    snapshots.read()
    assert len(dumps) == 2


def test_a_dump_that_takes_long_is_asked_for_again_when_it_has_ended(
    recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile only collectives change the state, and no group is told: with number 0 the rank would be behind."""
    monkeypatch.setattr(group_snapshots, "_DUMP_S", 0.01)
    may_end = threading.Event()
    entry = {"process_group": ["0"], "collective_seq_id": 7, "profiling_name": "gloo:barrier"}

    def dump(entries: bool, _stacks: bool) -> str:
        assert not entries or may_end.wait()
        return json.dumps({"entries": [entry] * entries})

    recorder._dump_fr_trace_json = dump
    snapshots = GroupSnapshots()
    before = snapshots.state()

    assert snapshots.read() == ()
    assert snapshots.state() == before
    monkeypatch.setattr(_Group, "issued", 4)
    assert snapshots.state() != before

    may_end.set()
    await_thread("traceml-flight-recorder")
    assert [each.number for each in snapshots.read()] == [7, 0]


def await_thread(name: str) -> None:
    """Wait until a thread has ended."""
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join()
