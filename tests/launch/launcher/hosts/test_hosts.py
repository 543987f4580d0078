"""Hosts and numbers of workers of a launch, by its arguments and by a real Slurm."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.launch.hosts import Hosts, Slurm
from traceml.errors import SlurmError, UsageError
from traceml.launch.launcher.hosts.hostfile import split_port
from traceml.launch.launcher.hosts.hosts import HostSpec, resolve_hosts

_SHOW = """
import dataclasses, json, os, sys
from traceml.launch.launcher.hosts.hosts import resolve_hosts
names, numbers = json.loads(sys.argv[1])
print(json.dumps([dataclasses.astuple(place) for place in resolve_hosts(names, numbers, None, os.environ)]))
"""


def test_auto_is_this_host() -> None:
    """Outside of Slurm there is one host, and its agent tells how many workers it gets."""
    assert resolve_hosts("auto", "auto", None, {}) == [HostSpec("localhost", "local")]


def test_names_of_this_host_need_no_ssh() -> None:
    """Loopback, this host's own name and its addresses are started directly; all others by ssh, in the given order."""
    own = socket.gethostname()
    names = ["elsewhere", own, "localhost", "127.0.0.1", "user@elsewhere", "192.0.2.1"]

    places = resolve_hosts(names, [1, 2, 3, 4, 5, 6], None, {})

    assert [place.name for place in places] == names
    assert [place.workers for place in places] == [1, 2, 3, 4, 5, 6]
    assert [place.transport for place in places] == ["ssh", "local", "local", "local", "ssh", "ssh"]


def test_a_port_means_ssh() -> None:
    """An sshd that was chosen by its port is used, also on this host; addresses of IPv6 are no host and port."""
    names = ["localhost:2222", "::1", "user@node1:22", "[fe80::1]:22", "ssh://node1:22"]

    assert [place.transport for place in resolve_hosts(names, 1, None, {})] == ["ssh", "local", "ssh", "ssh", "ssh"]
    assert split_port("user@node1:22") == ("user@node1", 22)
    assert split_port("root@[fe80::1]:2222") == ("root@fe80::1", 2222)
    assert split_port("fe80::1") == ("fe80::1", None)


def test_the_ssh_configuration_may_lead_elsewhere(tmp_path: Path) -> None:
    """A name of this host which the user's ssh configuration gives to another is the other."""
    config = tmp_path / "config"
    config.write_text("Host localhost\n  HostName 192.0.2.7\nHost 127.0.0.1\n  User somebody\n")

    assert [p.transport for p in resolve_hosts(["localhost", "127.0.0.1"], 1, config, {})] == ["ssh", "local"]


def test_the_ssh_configuration_may_have_another_encoding(tmp_path: Path) -> None:
    """A path in it does, or the script that launches has set the locale."""
    config = tmp_path / "config"
    config.write_bytes(b"Host localhost\n  IdentityFile /home/j\xfcrgen/key\n  HostName 192.0.2.7\n")

    assert [p.transport for p in resolve_hosts(["localhost"], 1, config, {})] == ["ssh"]


@pytest.mark.parametrize(
    ("names", "numbers", "words"),
    [
        (["a", "b", "a"], 1, "hostnames has a more than once"),
        ([], 1, "hostnames is empty"),
        ("node1", 1, "did you mean ['node1']"),
        ("node1,node2", 1, "did you mean ['node1', 'node2']"),
        (5, 1, "hostnames=5: give a list of names"),
        ({"node1": 2}, 1, "hostnames={'node1': 2}: give a list of names"),
        (["node1\0"], 1, "which is not a host name"),
        (["-oProxyCommand=x"], 1, "'-oProxyCommand=x', which is not a host name"),
        (["a b"], 1, "'a b', which is not a host name"),
        (["node1:ssh"], 1, "'node1:ssh': 'ssh' is not a port; give a number from 1 to 65535"),
        (["node1:"], 1, "'' is not a port"),
        (["node1:70000"], 1, "'70000' is not a port"),
        ("./none.txt", 1, "hostfile none.txt cannot be read: No such file or directory"),
        (["./none.txt"], 1, "hostfile none.txt cannot be read"),
        (["a", "b"], [1, 2, 3], "3 numbers for 2 hosts (a, b)"),
        (["a"], 0, "workers_per_host has 0: each host gets at least 1 worker"),
        (["a"], [True], "workers_per_host has True"),
        (["a"], "gpu", "workers_per_host='gpu': give a number"),
    ],
)
def test_what_cannot_be_is_reported(names: Any, numbers: Any, words: str) -> None:
    """Bad arguments are ValueErrors that name the value."""
    with pytest.raises(UsageError) as caught:
        resolve_hosts(names, numbers, None, {})

    assert isinstance(caught.value, ValueError)
    assert words in str(caught.value)


@pytest.mark.parametrize(("names", "numbers"), [("slurm", 1), (["slurm"], 1), (["localhost"], "slurm")])
def test_slurm_outside_of_slurm_is_a_runtime_error(names: Any, numbers: Any) -> None:
    """Asking for an allocation where there is none says which argument asked."""
    with pytest.raises(SlurmError, match="no Slurm allocation") as caught:
        resolve_hosts(names, numbers, None, {})

    assert isinstance(caught.value, RuntimeError)


def test_an_allocation_that_cannot_be_read_is_reported() -> None:
    """A job id alone, or a missing scontrol, is an error with words instead of one worker on the wrong host."""
    with pytest.raises(SlurmError, match="job 7 of Slurm has no SLURM_JOB_NODELIST"):
        resolve_hosts("auto", "auto", None, {"SLURM_JOB_ID": "7"})

    with pytest.raises(SlurmError, match="scontrol show hostnames"):
        resolve_hosts("auto", "auto", None, {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "PATH": "/none"})


def test_without_slurms_programs_hosts_are_reached_as_elsewhere() -> None:
    """A container in a job has its variables and no scontrol and srun: this host, and those that are named, work."""
    own = socket.gethostname()
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_CPUS_PER_NODE": "4", "PATH": "/none"}

    assert resolve_hosts("auto", "auto", None, {**job, "SLURM_JOB_NODELIST": own}) == [HostSpec(own, "local", None, 4)]
    places = resolve_hosts(["n1", "n2"], 1, None, {**job, "SLURM_JOB_NODELIST": "n[1-2]"})
    assert [place.transport for place in places] == ["ssh", "ssh"]
    with pytest.raises(SlurmError, match=r"srun is not on the PATH; name the hosts, such as \['localhost'\]"):
        resolve_hosts("slurm", 1, None, {**job, "SLURM_JOB_NODELIST": own})


@pytest.mark.parametrize(
    ("options", "asked", "expected"),
    [
        # CPUs of the allocation; tasks where the user asked for tasks; names beside the allocation; own numbers
        (["-N2", "-c3"], ["auto", "auto"], [["node1", "srun", None, 3, None], ["node2", "srun", None, 3, None]]),
        (["-N2", "-n3"], ["slurm", "slurm"], [["node1", "srun", None, 2, None], ["node2", "srun", None, 1, None]]),
        (
            ["-N2", "--ntasks-per-node=2", "-c2"],
            [["node2", "localhost"], "auto"],
            [["node2", "srun", None, 2, None], ["localhost", "local", None, None, None]],
        ),
        (["-N1", "--nodelist=node2"], ["auto", 2], [["node2", "srun", 2, 1, None]]),
        # the components of a heterogeneous job, by tasks and by CPUs
        (
            ["-N1", "-n1", ":", "-N1", "-n2"],
            ["auto", "auto"],
            [["node1", "srun", None, 1, 0], ["node2", "srun", None, 2, 1]],
        ),
        (
            ["-N1", "-c3", ":", "-N1", "-c2"],
            ["slurm", "slurm"],
            [["node1", "srun", None, 3, 0], ["node2", "srun", None, 2, 1]],
        ),
    ],
)
def test_the_allocation_tells_hosts_and_workers(
    slurm: Slurm, hosts: Hosts, options: list[str], asked: list[Any], expected: list[list[Any]]
) -> None:
    """Within an allocation, its nodes are the hosts, and what was asked for is the number of workers."""
    python = hosts.launcher.command()[0]
    script = hosts.launcher.script(_SHOW)

    told = slurm.run("salloc", "--quiet", *options, python, script, json.dumps(asked)).stdout

    assert json.loads(told) == expected


def test_a_step_does_not_hide_the_jobs_numbers(slurm: Slurm, hosts: Hosts) -> None:
    """Within a step of one task on one node, hosts and workers are those of the job."""
    step = ["srun", "-N1", "-n1", "--overlap"]
    script = [hosts.launcher.command()[0], hosts.launcher.script(_SHOW), json.dumps(["auto", "auto"])]

    told = slurm.run("salloc", "--quiet", "-N2", "-n4", "-c1", *step, *script).stdout

    assert json.loads(told) == [["node1", "srun", None, 3, None], ["node2", "srun", None, 1, None]]


def test_a_step_of_several_tasks_does_not_launch_several_times(slurm: Slurm, hosts: Hosts) -> None:
    """Each task would launch the whole job; the error says how to start the script once."""
    script = [hosts.launcher.command()[0], hosts.launcher.script(_SHOW), json.dumps(["auto", "auto"])]

    done = slurm.run("srun", "-n2", *script, check=False)

    assert done.returncode
    assert done.stdout == ""
    assert "one of 2 tasks of a step of Slurm's job" in done.stderr
    assert "`srun --ntasks=1`" in done.stderr


def test_a_host_beside_the_allocation_has_no_number_from_slurm(slurm: Slurm, hosts: Hosts) -> None:
    """workers_per_host='slurm' names the host of which Slurm knows nothing."""
    python, script = hosts.launcher.command()[0], hosts.launcher.script(_SHOW)

    done = slurm.run("salloc", "--quiet", "-N1", python, script, json.dumps([["localhost"], "slurm"]), check=False)

    assert done.returncode
    assert "host localhost is not part of Slurm's job" in done.stderr
