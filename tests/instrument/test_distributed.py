"""Two real ranks over gloo: own backward and waiting, collectives, and the group that is made after the hooks."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.forked import client as forked
from tests.instrument.group_cycles import CYCLES
from tests.instrument.ranks import STEPS_DONE

SCRIPT = Path(__file__).with_name("ranks.py")


KINDS = [
    "ddp",
    "ddp_buffers",
    "ddp_no_sync",
    "ddp_accumulates",
    "ddp_repeats",
    "ddp_bypassed",
    "fsdp2",
    "manual",
    "tensor_parallel",
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """All kinds of training on two ranks, one after another; what each rank found, by kind."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = [
        forked.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(folder / "store"), str(folder / f"{rank}.json"), *KINDS],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, stderr = process.communicate(timeout=240)
        assert process.returncode == 0, stderr

    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return {kind: [rank[kind] for rank in ranks] for kind in KINDS}


@pytest.mark.process
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks(kind: str, found: dict[str, list[dict[str, Any]]]) -> None:
    """Every step is there, parts add up, losses are unchanged, own backward is measured on the same steps."""
    ranks = found[kind]
    for number, rank in enumerate(ranks):
        assert (rank["errors"], rank["same"]) == (0, True)
        joined = [[[number, 2], False]] if kind == KINDS[0] else []  # it goes on for the other kinds
        assert rank["groups"] == [*joined, [None, True]]
        rows = rank["rows"]
        assert len(rows) == STEPS_DONE
        assert all(row["micro"] == (2 if kind in ("ddp_no_sync", "ddp_accumulates") else 1) for row in rows)
        assert all(row["forward_ns"] > 0 and row["backward_ns"] > 0 and row["optimizer_ns"] > 0 for row in rows)
        for row in rows:
            parts = sum(row[name] for name in row if name.endswith("_ns") and name not in ("t_end_ns", "total_ns"))
            assert parts - row["backward_own_ns"] <= row["total_ns"]
            assert row["backward_own_ns"] <= row["backward_ns"]
            assert (row["backward_own_ns"] > 0) == row["callback"]

        assert all(row["callback"] for row in rows if row["step"] % 16 == 0 or 2 <= row["step"] <= 16)
        if kind != "fsdp2":  # torch's own Python calls collectives there; which ones depends on its version
            assert all((row["comm_ns"] > 0) == (kind in ("ddp_buffers", "manual", "tensor_parallel")) for row in rows)

    sequences = [[row["sequence"] for row in rank["rows"]] for rank in ranks]
    assert sequences[0] == sorted(sequences[0])
    assert sequences[0][-1] > 0


@pytest.mark.process
@pytest.mark.parametrize(
    ("kind", "counted"),
    [
        ("ddp", (1, 1)),
        ("ddp_no_sync", (2, 1)),
        ("ddp_accumulates", (2, 2)),
        ("ddp_repeats", (1, 1)),
        ("ddp_bypassed", (1, 0)),
        ("fsdp2", None),
        ("manual", None),
    ],
)
def test_reductions_are_counted(
    kind: str, counted: tuple[int, int] | None, found: dict[str, list[dict[str, Any]]]
) -> None:
    """Backward passes of a step, and those that average gradients, of DDP models; also of a run of 24 steps.

    Each of two backward passes on one batch is reduced for an optimizer step of its own.
    """
    for rank in found[kind]:
        known = rank["reductions"]
        assert (known and (known["backwards_per_step"], known["reductions_per_step"])) == counted


@pytest.mark.process
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_average_gradients_are_known(kind: str, found: dict[str, list[dict[str, Any]]]) -> None:
    """Only their batches are compared: the ranks of a tensor-parallel group share them on purpose."""
    size = None if kind in ("manual", "tensor_parallel") else 2
    assert [rank["gradient_size"] for rank in found[kind]] == [size, size]


@pytest.mark.process
def test_own_backward_tells_who_is_slow(found: dict[str, list[dict[str, Any]]]) -> None:
    """Backward takes equally long on both ranks; its own part shows that rank 1 is the slow one."""
    ranks = found["ddp"]

    def median(rank: int, column: str) -> float:  # a rank that has to wait for a core once is late in one step
        return statistics.median(row[column] for row in ranks[rank]["rows"][4:] if row["callback"]) / 1e6

    assert median(1, "backward_own_ns") > 5
    assert median(0, "backward_own_ns") < median(0, "backward_ns") - 2
    assert median(0, "backward_own_ns") < median(1, "backward_own_ns") - 2


@pytest.mark.process
def test_waiting_for_the_buffers_of_another_rank_is_no_forward(found: dict[str, list[dict[str, Any]]]) -> None:
    """DDP broadcasts those of BatchNorm at the start of forward: rank 0 is late for it."""
    rows = found["ddp_buffers"][1]["rows"][4:]  # a rank that has to wait for a core once is late in one step
    waiting, forward = (statistics.median(row[name] for row in rows) / 1e6 for name in ("comm_ns", "forward_ns"))
    assert waiting > 3
    assert forward < waiting / 2


@pytest.mark.process
def test_a_group_is_destroyed_right_after_a_backward_pass(tmp_path: Path) -> None:
    """Torch alone deadlocks there within a few groups: see `await_gloo_threads`."""
    processes = [
        forked.Popen(
            [sys.executable, str(SCRIPT.with_name("group_cycles.py")), str(rank), str(tmp_path / "store")],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            with process:
                process.kill()

    assert outputs == [f"{CYCLES} groups\n"] * 2
