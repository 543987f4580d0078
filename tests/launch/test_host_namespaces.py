"""The hosts that other tests launch on are hosts: apart from each other, reachable by ssh only, and gone at the end."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.eventually import eventually

from .hosts import Hosts, Slurm

ROOT = Path(__file__).parents[2]


def test_hosts_have_names_and_processes_of_their_own(hosts: Hosts) -> None:
    """Through ssh, by a name that only ssh knows, another host is reached whose processes are its own."""
    ssh = ["ssh", "-F", hosts.ssh_config, "alias2"]

    assert hosts.launcher.run(*ssh, "hostname").stdout == "node2\n"
    assert hosts.launcher.python("import os; print(os.uname().nodename)").stdout == "node0\n"
    assert hosts.launcher.run(*ssh, "touch /dev/shm/x; ls /proc | grep -c '^[0-9]'").stdout != "0\n"
    assert not Path("/dev/shm/x").exists()


@pytest.mark.parametrize("forks", [False, True])
def test_a_command_dies_with_what_started_it(hosts: Hosts, *, forks: bool) -> None:
    """A process is visible on its host while it runs, and gone once a test kills it."""
    shown = "os.uname().nodename, os.readlink('/proc/self'), os.getpid()"
    code = f"import os, time; print({shown}, flush=True); time.sleep(600)"
    with hosts["node1"].start(sys.executable, "-c", code, env={"OMP_NUM_THREADS": "1"}, forks=forks) as process:
        assert process.stdout is not None
        name, *ids = process.stdout.readline().split()
        assert (name, ids[0]) == ("node1", ids[1])
        assert getattr(process, "forked", False) == forks
        assert hosts["node1"].processes()
        process.kill()

    eventually(lambda: not hosts["node1"].processes(), "the command to be gone")


def test_a_forked_command_ends_as_another_one(hosts: Hosts) -> None:
    """Its status and its signal are those of the process inside."""
    environ = {"OMP_NUM_THREADS": "1"}
    for code, status in (("raise SystemExit(3)", 3), ("import os; os.abort()", -signal.SIGABRT)):
        for forks in (False, True):
            done = hosts["node1"].run(sys.executable, "-c", code, env=environ, check=False, forks=forks)
            assert done.returncode == status


def test_a_cut_host_is_not_reached(hosts: Hosts) -> None:
    """With its link down a host does not answer; with the link up again it does."""
    ssh = ["ssh", "-F", hosts.ssh_config, "-o", "ConnectTimeout=1", "node2", "hostname"]
    with hosts.cut("node2"):
        assert hosts.launcher.run(*ssh, check=False).returncode == 255

    eventually(lambda: hosts.launcher.run(*ssh, check=False).stdout == "node2\n", "the host to answer again")


def test_slurm_allocates_real_hosts(slurm: Slurm) -> None:
    """A job step runs on each host of an allocation."""
    assert sorted(slurm.run("srun", "-N2", "-n2", "hostname").stdout.split()) == ["node1", "node2"]


@pytest.mark.process
def test_hosts_end_with_the_process_that_made_them(tmp_path: Path) -> None:
    """However it ends, nothing of them is left."""
    code = f"""
import time
from pathlib import Path
from tests.launch.hosts import Hosts
with Hosts(Path({str(tmp_path)!r}), 1) as hosts:
    print(*(host.pid for host in hosts.all), flush=True)
    time.sleep(600)
"""
    maker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert maker.stdout is not None
    with maker.stdout:
        firsts = [int(word) for word in maker.stdout.readline().split()]

    assert len(firsts) == 2
    spaces = {_space(pid) for pid in firsts}
    maker.send_signal(signal.SIGKILL)
    maker.wait()

    eventually(lambda: not _in_spaces(spaces), "all processes of the hosts to be gone")


def _in_spaces(spaces: set[str]) -> list[int]:
    found = []
    for pid in psutil.pids():
        try:
            if _space(pid) in spaces:
                found.append(pid)
        except OSError:
            continue

    return found


def _space(pid: int) -> str:
    return str(Path(f"/proc/{pid}/ns/net").readlink())
