"""The allocation that Slurm's variables and `scontrol` tell of; the real `scontrol` expands names without a cluster."""

from __future__ import annotations

import locale
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from traceml.errors import SlurmError
from traceml.launch.launcher.hosts import slurm
from traceml.launch.launcher.hosts.hosts import resolve_hosts
from traceml.launch.launcher.hosts.slurm import ScontrolError, allocation, step_command, task_options

_CONFIGURATION = "ClusterName=one\nSlurmctldHost=localhost\nNodeName=n1\nPartitionName=main Nodes=n1\n"


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The variables of a job, with the real `scontrol` and a configuration of Slurm."""
    configuration = tmp_path / "slurm.conf"
    configuration.write_text(_CONFIGURATION)
    return {"SLURM_JOB_ID": "7", "SLURM_CONF": str(configuration), "PATH": os.environ["PATH"]}


@pytest.fixture
def c_locale() -> Iterator[None]:
    """The locale of a script that calls setlocale(LC_ALL, "C")."""
    before = locale.setlocale(locale.LC_ALL)
    locale.setlocale(locale.LC_ALL, "C")
    yield
    locale.setlocale(locale.LC_ALL, before)


def nodes(environ: dict[str, str]) -> list[str]:
    found = allocation(environ)
    assert found is not None
    return list(found.workers)


def with_scontrol(folder: Path, script: str) -> dict[str, str]:
    """Return the variables of a job whose `scontrol` is a script: what the real one does only on broken hosts."""
    program = folder / "scontrol"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "PATH": f"{folder}:/usr/bin:/bin"}


@pytest.mark.needs("slurm")
@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("n1", ["n1"]),
        ("n1,gpu-7", ["n1", "gpu-7"]),
        ("n[1-3,07-08],login", ["n1", "n2", "n3", "n07", "n08", "login"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
    ],
)
def test_ranges_of_nodes_are_expanded(job: dict[str, str], listed: str, expected: list[str]) -> None:
    """In the order of Slurm, in which its numbers are, too; leading zeros are part of a name."""
    assert nodes(job | {"SLURM_JOB_NODELIST": listed}) == expected


@pytest.mark.needs("slurm")
@pytest.mark.parametrize("name", ["grün", os.fsdecode(b"gr\xfcn")])
@pytest.mark.usefixtures("c_locale")
def test_names_of_nodes_are_those_that_slurm_has(job: dict[str, str], name: str) -> None:
    """In UTF-8, or in the bytes of another encoding, whatever the locale of the script: srun is given them."""
    (first, _) = expected = [f"{name}1", f"{name}2"]

    assert nodes(job | {"SLURM_JOB_NODELIST": f"{name}[1-2]"}) == expected
    assert nodes(job | {"SLURM_JOB_NODELIST": ",".join(expected)}) == expected
    assert f"--nodelist={first}" in step_command(first)


@pytest.mark.needs("slurm")
@pytest.mark.parametrize(
    ("listed", "without", "words"),
    [
        ("n[3-1]", (), "n[3-1]` ended with 0, so the job's nodes are unknown: Invalid hostlist: n[3-1]"),
        ("n[1-2]", ("SLURM_CONF",), "unknown: scontrol: fatal: Could not establish a configuration source"),
    ],
)
def test_a_scontrol_that_tells_no_nodes_is_reported(
    job: dict[str, str], listed: str, without: tuple[str, ...], words: str
) -> None:
    """By its last line: the range is none, or the container has Slurm's programs and no configuration."""
    for name in without:
        del job[name]

    with pytest.raises(ScontrolError, match=re.escape(f"{words}; or name the hosts")):
        allocation(job | {"SLURM_JOB_NODELIST": listed})


@pytest.mark.needs("slurm")
def test_named_hosts_are_reached_without_slurms_configuration(job: dict[str, str]) -> None:
    """A container with slurm-client and no slurm.conf: the advice of the error, to name the hosts, works."""
    del job["SLURM_CONF"]
    job["SLURM_JOB_NODELIST"] = "n[1-2]"

    assert [host.transport for host in resolve_hosts(["n1", "n2"], 1, None, job)] == ["ssh", "ssh"]
    with pytest.raises(ScontrolError):
        resolve_hosts("auto", 1, None, job)


def test_the_words_of_a_failed_scontrol_may_have_any_encoding(tmp_path: Path) -> None:
    """They are for the reader, who gets what can be decoded."""
    with pytest.raises(
        ScontrolError, match="ended with 3, so the job's nodes are unknown: gr\ufffdn; or name the hosts"
    ):
        allocation(with_scontrol(tmp_path, r"printf 'gr\374n\n' >&2; exit 3"))


def test_a_scontrol_that_does_not_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system of its configuration may not answer."""
    monkeypatch.setattr(slurm, "_SCONTROL_TIMEOUT_S", 0.1)

    with pytest.raises(ScontrolError, match=r"cannot be run, so the job's nodes are unknown: .* timed out"):
        allocation(with_scontrol(tmp_path, "exec sleep 60"))


def test_scontrol_reads_none_of_the_scripts_input(tmp_path: Path, pipe: tuple[int, int]) -> None:
    """Lines that are piped to the script that launches stay there."""
    kept = os.dup(0)
    os.write(pipe[1], b"n3\n")
    os.dup2(pipe[0], 0)
    try:
        found = nodes(with_scontrol(tmp_path, "timeout 0.1 head -n1; echo n1 n2"))
    finally:
        os.dup2(kept, 0)
        os.close(kept)

    assert found == ["n1", "n2"]
    assert os.read(pipe[0], 9) == b"n3\n"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SLURM_JOB_CPUS_PER_NODE": "4(x2),2"}, [4, 4, 2]),
        ({"SLURM_JOB_CPUS_PER_NODE": "4(x3)", "SLURM_TASKS_PER_NODE": "1(x3)"}, [4, 4, 4]),
        ({"SLURM_JOB_CPUS_PER_NODE": "4(x3)", "SLURM_TASKS_PER_NODE": "2,1(x2)", "SLURM_NTASKS": "4"}, [2, 1, 1]),
        ({"SLURM_JOB_CPUS_PER_NODE": "8(x3)", "SLURM_TASKS_PER_NODE": "2(x3)", "SLURM_NTASKS_PER_NODE": "2"}, [2] * 3),
        # in a step, whose tasks these are
        ({"SLURM_JOB_CPUS_PER_NODE": "8(x3)", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}, [8, 8, 8]),
        ({"SLURM_JOB_CPUS_PER_NODE": "8,1,3", "SLURM_STEP_NUM_TASKS": "1", "SLURM_CPUS_PER_TASK": "2"}, [4, 1, 1]),
        # not of these nodes
        ({"SLURM_JOB_CPUS_PER_NODE": "4(x2)"}, [None] * 3),
        ({}, [None] * 3),
    ],
)
def test_each_node_has_its_number_of_workers(variables: dict[str, str], expected: list[int | None]) -> None:
    """The tasks where the user asked for tasks, else the CPUs; none where they are not known of each node."""
    found = allocation({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a,b,c", **variables})

    assert found is not None
    assert (list(found.workers.values()), found.groups) == (expected, {})


def test_a_node_of_two_components_is_used_in_the_first(caplog: pytest.LogCaptureFixture) -> None:
    """A heterogeneous job may have parts of one node in several; a host has one agent."""
    found = allocation(
        {
            "SLURM_JOBID": "7",
            "SLURM_HET_SIZE": "2",
            "SLURM_JOB_NODELIST_HET_GROUP_0": "a,b",
            "SLURM_JOB_CPUS_PER_NODE_HET_GROUP_0": "4(x2)",
            "SLURM_JOB_NODELIST_HET_GROUP_1": "b,c",
            "SLURM_JOB_CPUS_PER_NODE_HET_GROUP_1": "2(x2)",
        }
    )

    assert found is not None
    assert (found.job_id, found.workers, found.groups) == ("7", {"a": 4, "b": 4, "c": 2}, {"a": 0, "b": 0, "c": 1})
    assert "b is in components 0 and 1 of job 7: used in the first" in caplog.text


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"SLURM_HET_SIZE": "two"}, "SLURM_HET_SIZE is 'two', not a number"),
        ({"SLURM_HET_SIZE": "9" * 7}, "SLURM_HET_SIZE is '9999999', not a number"),
        ({"SLURM_HET_SIZE": "٢"}, "SLURM_HET_SIZE is '٢', not a number"),
        ({"SLURM_HET_SIZE": "2"}, "job 7 of Slurm has no SLURM_JOB_NODELIST_HET_GROUP_0"),
        ({"SLURM_JOB_CPUS_PER_NODE": "1(x9999999)"}, "'1(x9999999)' cannot be the CPUs or tasks"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "one of 4 tasks of a step of Slurm's job 7"),
    ],
)
def test_variables_that_slurm_does_not_set_so_are_reported(variables: dict[str, str], words: str) -> None:
    """With the variable and its value; a number of gigantic size would fill the memory."""
    with pytest.raises(SlurmError, match=re.escape(words)):
        allocation({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a", **variables})


def test_outside_of_a_job_there_is_no_allocation() -> None:
    """Empty variables are none."""
    assert allocation({}) is None
    assert allocation({"SLURM_JOB_ID": "", "SLURM_JOB_NODELIST": "a"}) is None


def test_a_step_names_its_component_only_in_a_heterogeneous_job() -> None:
    """srun refuses the option in other jobs; and what the job's tasks get must not reach it."""
    assert not any(word.startswith("--het-group") for word in step_command("a"))
    assert "--het-group=1" in step_command("a", 1)
    assert task_options({"SLURM_CPUS_PER_TASK": "4", "SLURM_JOB_ID": "7"}) == {"SLURM_CPUS_PER_TASK": "4"}
