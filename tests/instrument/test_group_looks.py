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
from traceml.instrument.group_looks import GroupLooks

_SCRIPT = """
import json, sys
import torch, torch.distributed as dist
from traceml.instrument.group_looks import GroupLooks

rank, store = int(sys.argv[1]), sys.argv[2]
looks = GroupLooks()
before = [looks.read(), looks.state()]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
ones = torch.ones(4, 2)
for _ in range(3):
    dist.all_reduce(ones)
pair = dist.new_group([0, 1], group_desc="pair")
unused = dist.new_group([0, 1], group_desc="unused")
state = looks.state()
if rank == 0:
    work = dist.all_reduce(ones, group=pair, async_op=True)
    found = looks.read()
    changed = state != looks.state()
    dist.barrier()
else:
    found, changed = looks.read(), state != looks.state()
    dist.barrier()
    work = dist.all_reduce(ones, group=pair, async_op=True)
work.wait()
print(json.dumps({"before": before, "found": [each.to_row() for each in found], "changed": changed}))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The answers of both ranks: rank 0 is in a collective of a sub-group, rank 1 is not."""
    folder: Path = tmp_path_factory.mktemp("groups")
    script = folder / "groups.py"
    script.write_text(_SCRIPT)
    processes = [
        forked.Popen(
            [sys.executable, str(script), str(rank), str(folder / "store")],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    answers = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    return [json.loads(out) for out, _ in answers]


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
    assert ranks[0]["before"] == [[], None]


def test_an_import_that_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorder's thread may ask while the script imports torch.distributed, which has no functions yet."""
    monkeypatch.setitem(sys.modules, "torch.distributed", ModuleType("torch.distributed"))
    looks = GroupLooks()

    assert looks.state() is None
    assert looks.read() == ()
