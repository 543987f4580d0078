"""Two real ranks over gloo: the newest operation by group, in flight or not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.forked import client as forked
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
    """Each group's newest number, operation, sizes and members."""
    done = {"number": 3, "operation": "all_reduce", "sizes": [8], "members": [0, 1]}

    assert ranks[0]["found"] == [
        done,
        {"name": "pair", "number": 1, "operation": "all_reduce", "sizes": [8], "members": [0, 1], "in_flight": True},
        {"name": "unused", "members": [0, 1]},
    ]
    assert ranks[1]["found"] == [done, {"name": "pair", "members": [0, 1]}, {"name": "unused", "members": [0, 1]}]


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
