"""Faults: what is disturbed, how the job is started, and what is done to it.

A fault is a function of a job that has not been started; it starts the job, disturbs it, and waits for its end.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from fault_jobs import RANKS, FaultedJob, until_stored
from relay import Relay
from tests.aggregator.test_durability import fill
from tests.launch.hosts import Hosts
from tests.system import missing

PYTHON = sys.executable
RUN = (PYTHON, "-m", "traceml", "run", "--live", "none", "--nproc-per-node", str(RANKS))
PAGE = (PYTHON, "-m", "traceml", "run", "--live", "web", "--nproc-per-node", str(RANKS))
LAUNCH = (PYTHON, "-m", "traceml", "launch", "--hostnames", "localhost", "--workers-per-host", str(RANKS))
TORCHRUN = (PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS))
LONG, SHORT = 1000, 150  # steps of 35 ms: longer than 30 s of silence, and as short as it may be
STOPPED_S = 30
_AT_STEP = 25
_TOKEN = "faults-of-one-machine"  # of aggregators that only these jobs can reach


@dataclass(frozen=True)
class Fault:
    """A fault.

    Attributes:
        where: the process, or the part of the system.
        what: the fault in words.
        act: starts the job, disturbs it, waits for its end.
        command: how the job is started.
        steps: of its training.
        environ: additional variables.
        options: additional options of the script.
        ends: whether the training is expected to end early.
        needs: parts of the system, by their name in tests/system.py.
    """

    where: str
    what: str
    act: Callable[[FaultedJob], str | None]
    command: tuple[str, ...] = RUN
    steps: int = SHORT
    environ: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    ends: bool = False
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Both in one."""
        return f"{self.where}: {self.what}"

    @property
    def lacking(self) -> list[str]:
        """What this machine lacks for it."""
        return [part.name for part in missing(self.needs)]


def _undisturbed(job: FaultedJob) -> None:
    job.start()
    job.finish()


def _signalled(name: str, number: signal.Signals) -> Callable[[FaultedJob], None]:
    def act(job: FaultedJob) -> None:
        job.start()
        job.wait_for_step(_AT_STEP)
        pid = job.pid_of(name)
        os.kill(pid, number)
        if number == signal.SIGSTOP:
            time.sleep(STOPPED_S)
            with suppress(ProcessLookupError):  # ended meanwhile, by whatever watches it
                os.kill(pid, signal.SIGCONT)

        job.finish()

    return act


def _signals() -> Iterator[Fault]:
    processes = (
        ("rank 1", RUN, True), ("aggregator", RUN, False), ("delivery", RUN, False), ("collector", RUN, False),
        ("page", PAGE, False), ("report maker", RUN, False), ("torchrun", RUN, True), ("launcher", RUN, True),
        ("agent", LAUNCH, True), ("zygote", LAUNCH, True), ("launcher", LAUNCH, True), ("rank 1", LAUNCH, True),
        ("aggregator", LAUNCH, False),
    )  # fmt: skip
    for name, command, ends in processes:
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP):
            stops = number == signal.SIGSTOP
            yield Fault(
                f"{name} of `traceml {command[3]}`" if name in ("rank 1", "launcher", "aggregator") else name,
                f"SIGSTOP for {STOPPED_S} s" if stops else number.name,
                _signalled(name, number),
                command,
                steps=LONG if stops else SHORT,
                environ=_environ_of(name),
                ends=ends and (not stops or name == "agent"),  # a host that is silent for 15 s is lost
            )


def _environ_of(name: str) -> dict[str, str]:
    return {"TRACEML_COLLECTORS": "faulted_collector:Endless", "PYTHONPATH": str(Path(__file__).parent)} if (
        name == "collector"
    ) else {}  # fmt: skip


# A team's aggregator


def _serving(job: FaultedJob) -> int:
    """Start `traceml serve` for a job that torchrun starts; return its port."""
    job.environ = {**job.environ, "TRACEML": "1", "TRACEML_TOKEN": _TOKEN}
    job.serve((), "--port", "0")
    words = (job.folder / "serve.log").read_text().replace("\n", " ").split()
    address = next(word for word in words if "127.0.0.1:" in word)
    return int(address.rpartition(":")[2].strip(".,;/"))


def _through_relay(disturb: Callable[[FaultedJob, Relay], None]) -> Callable[[FaultedJob], None]:
    def act(job: FaultedJob) -> None:
        relay = Relay(_serving(job))
        job.environ = {**job.environ, "TRACEML_HOST": "127.0.0.1", "TRACEML_PORT": str(relay.port)}
        job.start()
        disturb(job, relay)
        job.finish()
        _wait_for_rows(job)

    return act


def _delay(_job: FaultedJob, relay: Relay) -> None:
    relay.delay_s = 0.2


def _tear(job: FaultedJob, relay: Relay) -> None:
    job.wait_for_step(_AT_STEP)
    relay.tear_for(8)
    assert relay.torn > 1, "no connection was torn"


def _half_open(job: FaultedJob, relay: Relay) -> None:
    job.wait_for_step(_AT_STEP)
    relay.freeze()


def _killed_for_good(job: FaultedJob) -> None:
    port = _serving(job)
    job.environ = {**job.environ, "TRACEML_HOST": "127.0.0.1", "TRACEML_PORT": str(port)}
    job.start()
    job.wait_for_step(_AT_STEP)
    job.beside[0].kill()
    job.finish()


def _killed_then_served(job: FaultedJob) -> str:
    _killed_for_good(job)
    job.serve((), "--port", "0")
    _wait_for_rows(job)
    return "by a later `traceml serve`"


def _wait_for_rows(job: FaultedJob) -> None:
    wanted = sum(job.closed_steps(rank) for rank in range(RANKS))
    until_stored(lambda: len(job.stored("steps")) >= wanted and len(job.delivered()) >= wanted)


# Networks of two hosts


def _cut_serving(seconds: float) -> Callable[[FaultedJob], None]:
    def act(job: FaultedJob) -> None:
        with _hosts(job) as hosts:
            node0, node1 = hosts.launcher, hosts["node1"]
            job.environ = {
                **job.environ, "TRACEML": "1", "TRACEML_TOKEN": _TOKEN,
                "TRACEML_HOST": node0.address, "TRACEML_PORT": "29765",
            }  # fmt: skip
            job.serve(node0.command(), "--host", node0.address)
            job.command = (*node1.command(), *TORCHRUN)
            job.start()
            job.wait_for_step(_AT_STEP)
            with hosts.cut("node1"):
                time.sleep(seconds)

            job.finish()
            _wait_for_rows(job)

    return act


def _cut_launch(job: FaultedJob) -> None:
    with _hosts(job) as hosts:
        job.command = (
            *hosts.launcher.command(), PYTHON, "-m", "traceml", "launch", "--hostnames", "node1",
            "--workers-per-host", str(RANKS), "--ssh-config-file", str(hosts.ssh_config),
        )  # fmt: skip
        job.start()
        job.wait_for_step(_AT_STEP)
        with hosts.cut("node1"):
            job.finish()


@contextmanager
def _hosts(job: FaultedJob) -> Iterator[Hosts]:
    folder = job.folder / "hosts"
    folder.mkdir()
    with Hosts(folder, 1) as hosts:
        yield hosts


# Disks and folders


@contextmanager
def _mounted(folder: Path, *options: str) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", *options, str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _disk_full(seconds: float | None) -> Callable[[FaultedJob], str | None]:
    def act(job: FaultedJob) -> str | None:
        with _mounted(job.runs_dir, "-t", "tmpfs", "-o", "size=6m,mode=700", "none"):
            job.start()
            job.wait_for_step(_AT_STEP)
            ballast = fill(job.runs_dir)
            if seconds is not None:
                time.sleep(seconds)
                ballast.unlink()

            job.finish()
            aftermath = None
            if seconds is None:
                ballast.unlink()
                job.serve((), "--port", "0")
                _wait_for_rows(job)
                job.beside[0].terminate()
                aftermath = "by a later `traceml serve`, when there was space"

            shutil.copytree(job.runs_dir, job.folder / "copy", symlinks=True)

        shutil.copytree(job.folder / "copy", job.runs_dir, dirs_exist_ok=True, symlinks=True)
        return aftermath

    return act


def _read_only_runs(job: FaultedJob) -> None:
    with _mounted(job.runs_dir, "-t", "tmpfs", "-o", "ro,size=1m", "none"):
        job.start()
        job.finish()


def _read_only_homes(job: FaultedJob) -> None:
    folder = job.folder / "homes"
    with _mounted(folder, "-t", "tmpfs", "-o", "ro,size=1m", "none"):
        names = ("HOME", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TMPDIR", "TRACEML_LOG_DIR")
        job.environ = {**job.environ, **dict.fromkeys(names, str(folder))}
        job.start()
        job.finish()


def _immutable_run(job: FaultedJob) -> str:
    job.start()
    job.wait_for_step(_AT_STEP)
    until_stored(lambda: bool(job.delivered()))  # the tracker's file exists: only new files cannot be made
    (folder,) = job.run_dirs()
    subprocess.run(["chattr", "+i", str(folder)], check=True)
    try:
        job.finish()
    finally:
        subprocess.run(["chattr", "-i", str(folder)], check=True)

    return ""


def _moved_run(job: FaultedJob) -> str:
    job.start()
    job.wait_for_step(_AT_STEP)
    (folder,) = job.run_dirs()
    folder.rename(folder.with_name("moved"))
    job.finish()
    job.ask("sync", "moved")
    return "and delivered by `traceml sync moved`"


# Clock, descriptors, memory, namespaces


def _clock(job: FaultedJob) -> None:
    shift, library = job.folder / "shift", job.folder / "shim.so"
    shift.write_bytes(bytes(8))
    source = Path(__file__).with_name("clock_shim.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True)
    job.environ = {**job.environ, "LD_PRELOAD": str(library), "CLOCK_SHIFT": str(shift)}
    job.start()
    for step, seconds in ((25, 3600), (60, -2 * 86400)):
        job.wait_for_step(step)
        with shift.open("r+b") as file:
            file.write(struct.pack("=q", seconds))

    job.finish()


def _limited_aggregator(kind: int) -> Callable[[FaultedJob], None]:
    def act(job: FaultedJob) -> None:
        job.start()
        job.wait_for_step(_AT_STEP)
        pid = job.pid_of("aggregator")
        now = 3 if kind == resource.RLIMIT_NOFILE else _size_of(pid)
        resource.prlimit(pid, kind, (now, now))
        job.finish()

    return act


def _size_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()


def _under(*words: str) -> Callable[[FaultedJob], None]:
    def act(job: FaultedJob) -> None:
        job.command = (*words, *job.command)
        job.start()
        job.finish()

    return act


_SHM = 'mount -t tmpfs -o size=64m,mode=1777 shm /dev/shm; exec "$@"'
_SYSTEM = (
    Fault("network of `serve`", "200 ms delay in each direction", _through_relay(_delay), TORCHRUN),
    Fault("network of `serve`", "connections torn in messages for 8 s", _through_relay(_tear), TORCHRUN, steps=400),
    Fault("network of `serve`", "half-open connections", _through_relay(_half_open), TORCHRUN, steps=LONG),
    Fault("network of `serve`", "cut for 8 s", _cut_serving(8), steps=400, needs=("hosts", "root")),
    Fault("network of `serve`", "cut for 30 s", _cut_serving(30), steps=LONG, needs=("hosts", "root")),
    Fault("network of `launch`", "cut for good", _cut_launch, steps=400, ends=True, needs=("hosts", "root")),
    Fault("aggregator of `serve`", "SIGKILL for good", _killed_for_good, TORCHRUN),
    Fault("aggregator of `serve`", "SIGKILL, started again after the job", _killed_then_served, TORCHRUN),
    Fault("disk of the runs", "full for 5 s", _disk_full(5), steps=400, needs=("root",)),
    Fault("disk of the runs", "full until the end", _disk_full(None), needs=("root",)),
    Fault("folder of the runs", "read-only", _read_only_runs, ends=True, needs=("root",)),
    Fault("folder of the run", "immutable while it trains", _immutable_run, steps=400, needs=("root",)),
    Fault("folder of the run", "moved while it trains", _moved_run),
    Fault("home, temporary and runtime folders", "read-only", _read_only_homes, needs=("root",)),
    Fault("wall clock", "+1 h, then -2 days", _clock, needs=("compiler",)),
    Fault("descriptors", "`ulimit -n 64` for all", _under("prlimit", "--nofile=64")),
    Fault("descriptors", "none left in the ranks", _undisturbed, options=("--take-descriptors-at", "25")),
    Fault("descriptors", "none left in the aggregator", _limited_aggregator(resource.RLIMIT_NOFILE)),
    Fault("memory", "`ulimit -v` of 1.5 GB for all", _under("prlimit", "--as=1500000000")),
    Fault("memory", "none left in the aggregator", _limited_aggregator(resource.RLIMIT_AS)),
    Fault("/dev/shm", "64 MB", _under("unshare", "-m", "sh", "-c", _SHM, "sh"), needs=("root",)),
    Fault("/dev/shm", "3 MB", _under("unshare", "-m", "sh", "-c", _SHM.replace("64m", "3m"), "sh"), needs=("root",)),
    Fault("pid namespace", "of its own", _under("unshare", "--pid", "--fork", "--mount-proc"), needs=("root",)),
)  # fmt: skip
FAULTS = (
    Fault("-", "none: `traceml run`", _undisturbed),
    Fault("-", "none: `traceml launch`", _undisturbed, LAUNCH),
    *_signals(),
    *_SYSTEM,
)
REFERENCE = Fault("-", "untraced", _undisturbed, TORCHRUN, steps=LONG, environ={"TRACEML_ENABLED": "0"},)  # fmt: skip
