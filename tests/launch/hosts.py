"""Several real hosts on one machine, each with its own network, name, processes and sshd; and a real Slurm on them.

A host is what hangs on one process: it is gone, with all that runs on it, when that process ends, and that ends with
us. Nothing is named in the machine's own namespaces, so any number of such sets stand side by side. Hosts share the
machine's files (as over a network file system) but not /dev/shm, /run and /proc. By hand:

    from tests.launch.hosts import Hosts
    with Hosts(Path("/tmp/empty-folder"), 2) as hosts:
        print(hosts.launcher.python("import traceml; ..."))
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.eventually import eventually
from tests.forked import client as forked

__all__ = ["Host", "Hosts", "Slurm", "eventually"]

# The first process of a host: prepares it, then reaps what is left to it for ever.
_FIRST = """
set -e
mount -t proc proc /proc
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t tmpfs run /run
mkdir /run/sshd
mount --bind "$2" /etc/hosts
if [ -e ~/.bashrc ]; then mount --bind /dev/null ~/.bashrc; fi  # of the machine: it may do anything, slowly
hostname "$1"
ip link set lo up
: > "$3"
while :; do sleep 86399 || :; done
"""
_DAEMONS = {"slurmscriptd", "sshd", "sshd-session", "munged", "slurmd", "slurmctld", "slurmstepd"}


@dataclass
class Host:
    """One host: its name, its address, and commands that run there."""

    name: str
    address: str
    folder: Path
    pid: int  # of its first process, as the machine counts

    def command(self, *words: str | Path) -> list[str]:
        """Return what runs `words` there when run here; it ends when they end, and they end with it."""
        return forked.command_inside(self.pid, words)

    def start(
        self, *words: str | Path, env: Mapping[str, str] | None = None, forks: bool = False, **options: Any
    ) -> subprocess.Popen[str]:
        """Start a command there, in a session of its own; options are Popen's. With `forks`, fork it if possible."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("TRACEML_", "SLURM_"))}
        defaults: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        defaults |= {"text": True, "cwd": self.folder, "start_new_session": True, "env": {**kept, **(env or {})}}
        if forks:
            return forked.Popen([*map(str, words)], forks=True, inside=self.pid, **{**defaults, **options})

        return subprocess.Popen(self.command(*words), **{**defaults, **options})

    def run(
        self,
        *words: str | Path,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 100,
        check: bool = True,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command there to its end; fails, with what it wrote, when it fails and `check` is true."""
        process = self.start(*words, env=env, **options)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"{words} on {self.name} took over {timeout_s} s:\n{out}\n{err}") from None

        assert not check or process.returncode == 0, f"{words} on {self.name} gave {process.returncode}:\n{out}\n{err}"
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def python(self, code: str | Path, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a script (a path) or source text there with this interpreter; text is stored as a script first."""
        return self.run(sys.executable, self.script(code), *arguments, **options)

    def script(self, code: str | Path) -> Path:
        """Return the path of a script that holds `code`, in a folder of its own."""
        if isinstance(code, Path):
            return code

        number = 0
        while True:
            path = self.folder / f"script-{self.name}-{number}" / "script.py"
            try:
                path.parent.mkdir()
            except FileExistsError:
                number += 1
                continue

            path.write_text(code)
            return path

    def processes(self) -> list[psutil.Process]:
        """Return what runs there but its first process, its sleep and its daemons, with the machine's pids."""
        mine, found = _space(self.pid), []
        for process in psutil.process_iter():
            try:
                if _space(process.pid) == mine and not self._is_furniture(process):
                    found.append(process)
            except (OSError, psutil.Error):
                continue  # it ended meanwhile

        return found

    def _is_furniture(self, process: psutil.Process) -> bool:
        return process.pid == self.pid or process.cmdline() == ["sleep", "86399"] or process.name() in _DAEMONS


class Hosts:
    """`count` hosts named node1, node2, … with an sshd each, and node0, the launcher's. A context manager.

    Args:
        folder: an empty folder for keys, configuration and logs.
        count: how many hosts beside node0.

    `ssh_config` also knows alias1, … (names that only ssh resolves), and hosts that fail: `wrongkey`, `refused`
    (nobody listens), `badhostkey`, `unknown` (no such name), `silent` (no such address).
    """

    def __init__(self, folder: Path, count: int = 2) -> None:
        self.folder = folder
        self.ssh_config = folder / "ssh_config"
        self.all: list[Host] = []
        self._count = count
        self._firsts: list[subprocess.Popen[bytes]] = []
        self._switch = 0

    @property
    def launcher(self) -> Host:
        """The host that scripts launch from."""
        return self.all[0]

    @property
    def names(self) -> list[str]:
        """The names of all hosts but the launcher's."""
        return [host.name for host in self.all[1:]]

    def __getitem__(self, name: str) -> Host:
        return next(host for host in self.all if host.name == name)

    def __enter__(self) -> Hosts:
        try:
            self._set_up()
        except BaseException:
            self.close()
            raise

        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @contextmanager
    def cut(self, name: str) -> Iterator[None]:
        """Take a host's link down, as a pulled cable would, until the block ends."""
        self._link(name, "down")
        try:
            yield
        finally:
            self._link(name, "up")

    def close(self) -> None:
        """End all hosts and everything on them."""
        for process in self._firsts:
            process.kill()

        for process in self._firsts:
            process.wait()

        for host in self.all:  # the kernel ends the others; only then is the host gone
            eventually(lambda host=host: not psutil.pid_exists(host.pid), f"{host.name} to be gone")

        self._firsts, self.all = [], []

    def _link(self, name: str, state: str) -> None:
        self._on_switch(f"link set v{self.all.index(self[name])} {state}")

    def _set_up(self) -> None:
        known = [("127.0.0.1", "localhost"), *((_address(i), f"node{i}") for i in range(self._count + 1))]
        (self.folder / "hosts").write_text("".join(f"{address} {name}\n" for address, name in known))
        self._keys()
        switch = self._unshare(["--net"], "exec sleep infinity")
        self._switch = eventually(lambda: _child_of(switch), "the switch")
        for i in range(self._count + 1):
            ready = self.folder / f"ready{i}"
            arguments = [f"node{i}", str(self.folder / "hosts"), str(ready)]
            outer = self._unshare(["--net", "--uts", "--mount", "--pid"], _FIRST, *arguments)
            pid = eventually(lambda outer=outer: _child_of(outer), f"node{i}")
            self.all.append(Host(f"node{i}", _address(i), self.folder, pid))

        for i in range(self._count + 1):
            eventually((self.folder / f"ready{i}").exists, f"node{i} to be prepared")

        self._wire()
        self._ssh()

    def _unshare(self, kinds: Sequence[str], script: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "unshare",
            *kinds,
            "--fork",
            "--kill-child",
            "sh",
            "-c",
            script,
            "sh",
        ]
        with (self.folder / "hosts.log").open("ab") as log:
            process = subprocess.Popen([*command, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log)

        self._firsts.append(process)
        return process

    def _wire(self) -> None:
        lines = ["link add br0 type bridge", "link set br0 up"]
        for i, host in enumerate(self.all):
            lines.append(f"link add v{i} type veth peer name eth0 netns {host.pid}")
            lines.append(f"link set v{i} master br0 up")

        self._on_switch(*lines)
        for host in self.all:
            host.run("ip", "addr", "add", f"{host.address}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")

    def _on_switch(self, *lines: str) -> None:
        command = ["nsenter", "--net", "-t", str(self._switch), "ip", "-batch", "-"]
        subprocess.run(command, input="\n".join(lines), text=True, check=True)

    def _keys(self) -> None:
        for name in ("id", "wrong", "hostkey"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name], check=True)

    def _ssh(self) -> None:
        folder, entries = self.folder, []
        for i, host in enumerate(self.all):
            (folder / f"sshd{i}.conf").write_text(
                f"ListenAddress {host.address}\nHostKey {folder}/hostkey\nAuthorizedKeysFile {folder}/id.pub\n"
                "PidFile none\nStrictModes no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
                "UsePAM no\nKbdInteractiveAuthentication no\nMaxStartups 100\nMaxSessions 100\n"
            )
            host.run("/usr/sbin/sshd", "-f", folder / f"sshd{i}.conf", "-E", folder / f"sshd{i}.log")
            entries.append(f"Host {host.name} alias{i}\n  HostName {host.address}\n")

        first = self.all[-1].address
        strict = f"StrictHostKeyChecking yes\n  UserKnownHostsFile {folder}/known_hosts"
        (folder / "known_hosts").write_text(f"{first} {(folder / 'wrong.pub').read_text()}")
        entries += [
            f"Host wrongkey\n  HostName {first}\n  IdentityFile {folder}/wrong\n",
            f"Host refused\n  HostName {first}\n  Port 9\n",
            f"Host badhostkey\n  HostName {first}\n  {strict}\n",
            "Host unknown\n  HostName no-such-host.invalid\n",
            "Host silent\n  HostName 10.77.0.250\n",
            f"Host * !wrongkey\n  IdentityFile {folder}/id\n",
            "Host *\n  User root\n  IdentitiesOnly yes\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n",
            "  LogLevel ERROR\n  BatchMode yes\n  ConnectTimeout 5\n",
        ]
        self.ssh_config.write_text("".join(entries))


class Slurm:
    """A real Slurm over hosts: the controller on node0, a node on each other. A context manager.

    Commands (`salloc`, `srun`, `sinfo`, …) run by `run` on node0.
    """

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self._folder = hosts.folder / "slurm"
        self._daemons: list[subprocess.Popen[str]] = []

    @property
    def environ(self) -> dict[str, str]:
        """Return the environment for Slurm's commands."""
        return {"SLURM_CONF": str(self._folder / "slurm.conf")}

    def run(self, *words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on node0 with Slurm's configuration; options are those of Host.run."""
        return self.hosts.launcher.run(*words, env={**self.environ, **options.pop("env", {})}, **options)

    def __enter__(self) -> Slurm:
        try:
            self._set_up()
        except BaseException:
            self.close()
            raise

        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the daemons."""
        for daemon in reversed(self._daemons):
            daemon.terminate()

        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

        self._daemons = []

    def _set_up(self) -> None:
        (self._folder / "state").mkdir(parents=True)
        key = self._folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        (self._folder / "slurm.conf").write_text(self._configuration())
        for host in self.hosts.all:
            log = self._folder / f"munged-{host.name}.log"
            files = f"--pid-file /run/munge/pid --log-file {log} --seed-file /run/munge/seed"
            munged = f"mkdir -p -m 755 /run/munge; exec munged --foreground --force --key-file {key} {files}"
            self._daemon(host, "sh", "-c", munged)
            eventually(lambda host=host: host.run("munge", "-n", check=False).returncode == 0, f"munge of {host.name}")

        self._daemon(self.hosts.launcher, "slurmctld", "-D")
        for host in self.hosts.all[1:]:
            self._daemon(host, "slurmd", "-D", "-N", host.name)

        eventually(self._is_ready, "the nodes to be idle")

    def _daemon(self, host: Host, *words: str) -> None:
        with (self._folder / f"{shlex.quote(words[0])}-{host.name}.out").open("ab") as log:
            self._daemons.append(host.start(*words, env=self.environ, stdout=log, stderr=log))

    def _is_ready(self) -> bool:
        states = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).stdout.split()
        return states == ["idle"] * (len(self.hosts.all) - 1)

    def _configuration(self) -> str:
        head = self.hosts.launcher
        nodes = self.hosts.all[1:]
        lines = [
            "ClusterName=one",
            f"SlurmctldHost={head.name}({head.address})",
            "SlurmUser=root",
            "AuthType=auth/munge",
            "CryptoType=crypto/munge",
            "CredType=cred/munge",
            f"StateSaveLocation={self._folder}/state",
            f"SlurmdSpoolDir={self._folder}/%n",
            "SlurmctldPidFile=/run/slurmctld.pid",
            "SlurmdPidFile=/run/slurmd.pid",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SwitchType=switch/none",
            "MpiDefault=none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            # heterogeneous jobs start by the backfill scheduler alone, which else looks twice in a minute
            "SchedulerParameters=bf_interval=1,sched_interval=2",
            "ReturnToService=2",
            "SlurmdParameters=config_overrides",
            "JobAcctGatherType=jobacct_gather/none",
            "AccountingStorageType=accounting_storage/none",
            *(f"NodeName={n.name} NodeHostname={n.name} NodeAddr={n.address} CPUs=4 RealMemory=2000" for n in nodes),
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            f"PartitionName=main Nodes={','.join(n.name for n in nodes)} Default=YES State=UP OverSubscribe=YES",
            # a job of `urgent` takes the nodes of one of `spare`, which has a grace time to save
            f"PartitionName=spare Nodes={','.join(n.name for n in nodes)} State=UP PriorityTier=1 GraceTime=90",
            f"PartitionName=urgent Nodes={','.join(n.name for n in nodes)} State=UP PriorityTier=9 PreemptMode=OFF",
        ]
        return "\n".join(lines) + "\n"


def _space(pid: int) -> str:
    return str(Path(f"/proc/{pid}/ns/pid").readlink())


def _address(number: int) -> str:
    return f"10.77.0.{10 + number}"


def _child_of(process: subprocess.Popen[bytes]) -> int:
    if process.poll() is not None:
        raise AssertionError(f"{process.args} ended with {process.returncode}")

    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(children[0]) if children else 0
