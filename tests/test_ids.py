"""Keys of jobs and the ranks in them."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from traceml.ids import detect_rank, job_key, launcher_job, new_run_id, run_name_of, safe_run_id

HAND = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
TORCHRUN = {**HAND, "TORCHELASTIC_RUN_ID": "none"}
STANDALONE = "9f1c2a4e-5b6d-4c7e-8f90-a1b2c3d4e5f6"  # torchrun's id of a job on one host
SLURM = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "3", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
PASSED_ON = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
BATCH = {**PASSED_ON, "SLURM_TASK_PID": "4242"}  # of a batch script
OPENMPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("environ", "key"),
    [
        (TORCHRUN, "torchrun@node0:29500"),
        ({**TORCHRUN, "TORCHELASTIC_RUN_ID": "exp"}, "torchrun-exp@node0:29500"),
        ({**TORCHRUN, "TORCHELASTIC_RUN_ID": STANDALONE}, f"torchrun-{STANDALONE}"),
        ({**TORCHRUN, "TORCHELASTIC_RUN_ID": STANDALONE, "MASTER_PORT": "41234"}, f"torchrun-{STANDALONE}"),
        ({**TORCHRUN, **SLURM}, "torchrun@node0:29500"),
        ({**TORCHRUN, "MASTER_ADDR": "127.0.0.1"}, f"torchrun@{socket.gethostname()}:29500"),
        ({**SLURM, **HAND}, "slurm-77.3"),
        ({**BATCH, **HAND}, "group@node0:29500"),
        (PASSED_ON, "slurm-77.0"),
        ({"TORCHELASTIC_RUN_ID": "exp", "MASTER_PORT": "1"}, f"torchrun-exp@{socket.gethostname()}:1"),
        ({**HAND, "MASTER_ADDR": "localhost"}, f"group@{socket.gethostname()}:29500"),
        ({**SLURM, **OPENMPI, "PMIX_NAMESPACE": "prterun-node0-42@1"}, "openmpi-prterun-node0-42@1"),
        ({**OPENMPI, "PMIX_NAMESPACE": "prterun-node0-42@1"}, "openmpi-prterun-node0-42@1"),
        ({**OPENMPI, "OMPI_MCA_ess_base_jobid": "4242"}, "openmpi-4242"),
        ({**OPENMPI, "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}, "group@node0:29500"),
        (HAND, "group@node0:29500"),
        ({**TORCHRUN, **SLURM, "TRACEML_RUN_ID": "mine"}, "mine"),
    ],
)
def test_ranks_of_a_job_share_the_launchers_key(environ: dict[str, str], key: str) -> None:
    """The user's run id, then torchrun, OpenMPI, Slurm's step, and the rendezvous address of manually started ranks."""
    assert job_key(environ) == key


@pytest.mark.parametrize(
    "environ", [{}, {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}, {"PMIX_NAMESPACE": "x"}, BATCH]
)
def test_a_process_alone_is_a_job_of_its_own(environ: dict[str, str]) -> None:
    """Variables of a group without other ranks, left over in a shell, are ignored.

    So are those of a batch script, whose own steps, and whose programs, are jobs apart.
    """
    assert launcher_job(environ) is None
    assert job_key(environ) != job_key(environ)


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        (TORCHRUN, (1, 2, 1, "torchrun")),
        (SLURM, (1, 2, 0, "slurm")),
        ({**SLURM, **OPENMPI}, (1, 2, 0, "openmpi")),
        (BATCH, (0, 1, 0, "single process")),
        (PASSED_ON, (0, 2, 0, "slurm")),
        (OPENMPI, (1, 2, 0, "openmpi")),
        ({"RANK": "2", "WORLD_SIZE": "2"}, (0, 1, 0, "single process")),
        ({"RANK": "x", "WORLD_SIZE": "2"}, (0, 1, 0, "single process")),
    ],
)
def test_rank_comes_from_the_launchers_variables(environ: dict[str, str], found: tuple[int, int, int, str]) -> None:
    """The first launcher with valid variables gives the rank."""
    own = detect_rank(environ)

    assert (own.rank, own.world_size, own.local_rank, own.source) == found


@pytest.mark.parametrize(("environ", "local"), [({}, 1), ({"LOCAL_RANK": "0"}, 0), (TORCHRUN, 1)])
def test_a_group_that_is_joined_gives_the_rank(environ: dict[str, str], local: int) -> None:
    """Before it exists, as its other ranks may never come."""
    own = detect_rank(environ, joining=(1, 3))

    assert (own.rank, own.world_size, own.local_rank, own.source) == (1, 3, local, "torch.distributed")


def test_an_import_that_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.distributed that another thread imports has no functions yet: the variables tell the rank."""
    monkeypatch.setitem(sys.modules, "torch.distributed", ModuleType("torch.distributed"))

    assert detect_rank({"RANK": "3", "WORLD_SIZE": "4"}).rank == 3


def test_a_new_run_has_an_id_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many jobs that start in one second two draw the same number, also when neither has a folder yet."""
    drawn = iter([b"\1\2", b"\1\2", b"\3\4", b"\3\4", b"\5\6"])
    monkeypatch.setattr(os, "urandom", lambda _count: next(drawn))
    monkeypatch.setattr(time, "strftime", lambda _layout: "20260101-000000")

    first = new_run_id("train", tmp_path)
    (tmp_path / first).mkdir()
    monkeypatch.setattr("traceml.ids._given", set())
    ids = [first, new_run_id("train", tmp_path), new_run_id("train", tmp_path)]

    assert [run_id[-4:] for run_id in ids] == ["0102", "0304", "0506"]


def test_letters_of_other_languages_stay() -> None:
    """Two names that differ in them alone are two runs; how an accent is written makes no other run."""
    names = ["größe", "grüße", "grün", "gru\u0308n", "学習", "a b\u202e/c", "ü" * 300]

    expected = ["größe", "grüße", "grün", "grün", "学習", "a-b-c"]
    assert [safe_run_id(name) for name in names] == [*expected, "ü" * 100]
    assert [run_name_of(name) for name in names] == [*expected, "ü" * 24]
