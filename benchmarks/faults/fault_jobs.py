"""Jobs that are disturbed: one at a time, in a folder of its own, with the processes that belong to it.

A process belongs to a job when its environment says so, also when its parent is gone. Names of processes are those of
docs/architecture.md.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.eventually import eventually

from traceml.database.store.reader import StoreReader
from traceml.run_folder import STORE_NAME

TRAINING = Path(__file__).resolve().with_name("seeded_training.py")
RANKS = 2
_MARK = "FAULTED_JOB"
_LISTENS = "traceml aggregator at"
# Words of the command line; of several processes with the same words, the first or the last one started.
_PROCESSES = {
    "aggregator": ("-m traceml serve", 0),
    "delivery": ("-m traceml.track.delivery", -1),
    "page": ("traceml.display.web", 0),
    "report maker": ("traceml.display.report_main", -1),
    "torchrun": ("traceml.supervise.elastic", 0),
    "collector": ("collector_main", 0),
    "agent": ("traceml-agent", -1),
    "zygote": ("traceml-workers", 0),
}


@dataclass
class FaultedJob:
    """A training that is started by a command, and what its end left.

    Attributes:
        folder: of the job; `losses.RANK` and `counts.RANK` lie there.
        command: how it is started; the script's arguments are added.
        steps: of the training.
        environ: additional variables.
        script_options: additional options of the script.
    """

    folder: Path
    command: Sequence[str]
    steps: int
    environ: dict[str, str] = field(default_factory=dict)
    script_options: Sequence[str] = ()
    status: int | None = None
    output: str = ""

    def __post_init__(self) -> None:
        self._files = [(self.folder / name).open("wb") for name in ("stdout", "stderr")]
        self.process: subprocess.Popen[bytes] | None = None
        self.beside: list[subprocess.Popen[bytes]] = []

    @property
    def variables(self) -> dict[str, str]:
        """The environment of all processes of the job."""
        outer = ("TRACEML", "TORCHELASTIC", "SLURM", "OMPI_", _MARK)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
        own = {_MARK: str(self.folder), "OMP_NUM_THREADS": "1", "XDG_CONFIG_HOME": str(self.folder)}
        own |= {"TRACEML_COLLECTORS": "", "TRACEML_TRACK_GIT": "0", "TRACEML_TRACK_ENV": "0"}
        return kept | own | {"TRACEML_RUNS_DIR": str(self.runs_dir), "TRACEML_BACKEND": "jsonl"} | self.environ

    @property
    def runs_dir(self) -> Path:
        """Runs folder of the job."""
        return self.folder / "runs"

    @property
    def script(self) -> list[str]:
        """The script with its arguments."""
        return [str(TRAINING), "--folder", str(self.folder), "--steps", str(self.steps), *self.script_options]

    def start(self) -> None:
        """Start the job."""
        stdout, stderr = self._files
        self.process = subprocess.Popen(
            [*self.command, *self.script], cwd=self.folder, env=self.variables,
            stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True,
        )  # fmt: skip

    def serve(self, prefix: Sequence[str] = (), *options: str) -> subprocess.Popen[bytes]:
        """Start an aggregator of its own for the job, and return it when it listens."""
        log = self.folder / "serve.log"
        with log.open("ab") as file:
            served = subprocess.Popen(
                [*prefix, sys.executable, "-m", "traceml", "serve", *options], cwd=self.folder, env=self.variables,
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip

        self.beside.append(served)
        before = log.read_text().count("aggregator at")
        eventually(
            lambda: log.read_text().count("aggregator at") > before or served.poll() is not None, "serve to listen"
        )
        return served

    def closed_steps(self, rank: int = 0) -> int:
        """Return how many steps a rank has closed so far."""
        return self._counts(rank)[0]

    def logged_values(self, rank: int = 0) -> int:
        """Return how many values a rank has logged so far."""
        return self._counts(rank)[1]

    def wait_for_step(self, step: int, timeout_s: float = 90) -> None:
        """Wait until every rank has closed so many steps, or the job has ended."""

        def reached() -> bool:
            return self.has_ended or all(self.closed_steps(rank) >= step for rank in range(RANKS))

        eventually(reached, f"step {step} in {self.folder}: {self._text()[-2000:]}", timeout_s=timeout_s)

    @property
    def has_ended(self) -> bool:
        """Whether the command has ended."""
        return self.process is not None and self.process.poll() is not None

    def pid_of(self, name: str) -> int:
        """Return the pid of a process of the job by the name of docs/architecture.md; waits for it."""
        if name.startswith("rank"):
            return int((self.folder / f"pid.{name[-1]}").read_text())

        if name == "launcher":
            assert self.process is not None
            return self.process.pid

        words, index = _PROCESSES[name]
        found = eventually(lambda: self._matching(words), f"{name} in {self.folder}", timeout_s=30)
        return found[index]

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a process of the job."""
        os.kill(self.pid_of(name), number)

    def pids(self) -> list[int]:
        """Return the processes of the job, the oldest first."""
        mark = f"{_MARK}={self.folder}".encode()
        return sorted(pid for pid in _all_pids() if mark in _bytes_of(pid, "environ").split(b"\0"))

    def finish(self, timeout_s: float = 150) -> None:
        """Wait for the end of the command."""
        assert self.process is not None
        try:
            self.status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.status = None

        self.output = self._text()

    def left(self, within_s: float = 20) -> list[str]:
        """Return the command lines of processes that still run a while after the job's end."""
        deadline = time.monotonic() + within_s
        while (pids := self._remaining()) and time.monotonic() < deadline:
            time.sleep(0.2)

        return [_bytes_of(pid, "cmdline").replace(b"\0", b" ").decode()[:100] for pid in pids]

    def close(self) -> None:
        """End whatever is left of the job."""
        for pid in self.pids():
            _kill(pid)

        for process in [self.process, *self.beside]:
            if process is not None:
                process.kill()
                process.wait()

        for file in self._files:
            file.close()

    def ask(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command of ours in the job's folder."""
        return subprocess.run(
            [sys.executable, "-m", "traceml", *words], cwd=self.folder, env=self.variables,
            capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip

    def run_dirs(self) -> list[Path]:
        """Return the folders of its runs."""
        return sorted(path.parent for path in self.runs_dir.glob(f"*/{STORE_NAME}") if not path.parent.is_symlink())

    def stored(self, table: str) -> list[tuple[int, int]]:
        """Return (rank, step) of the rows of a table, over all runs."""
        found = []
        for folder in self.run_dirs():
            with StoreReader(folder / STORE_NAME) as reader:
                ranks = {record.id: record.rank for record in reader.streams()}
                found += [(ranks[int(row["stream"])], int(row["step"])) for row in reader.rows(table)]

        return found

    def delivered(self) -> list[tuple[str, int]]:
        """Return (name, step) of the logged values that its tracker has; the name has the rank."""
        files = [path for folder in self.run_dirs() for path in folder.glob("jsonl/*.jsonl")]
        lines = [line for path in files for line in path.read_text().splitlines()]
        rows = [json.loads(line) for line in lines]
        return [
            (row["name"], row["step"]) for row in rows if row["type"] == "metric" and row["name"].startswith("loss")
        ]

    def losses(self, rank: int) -> list[str]:
        """Return a line per step of a rank: loss and hash of the weights."""
        path = self.folder / f"losses.{rank}"
        return path.read_text().splitlines() if path.exists() else []

    def _counts(self, rank: int) -> tuple[int, int]:
        path = self.folder / f"counts.{rank}"
        data = path.read_bytes() if path.exists() else b""
        return struct.unpack("=QQ", data) if len(data) == 16 else (0, 0)

    def _matching(self, words: str) -> list[int]:
        return [pid for pid in self.pids() if words in _bytes_of(pid, "cmdline").replace(b"\0", b" ").decode()]

    def _remaining(self) -> list[int]:
        beside = {process.pid for process in self.beside}
        return [pid for pid in self.pids() if pid not in beside and _parent(pid) not in beside]

    def _text(self) -> str:
        return "".join((self.folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))


def until_stored(complete: Callable[[], bool], timeout_s: float = 30) -> bool:
    """Poll until all rows are stored; return whether they are."""
    deadline = time.monotonic() + timeout_s
    while not complete() and time.monotonic() < deadline:
        time.sleep(0.5)

    return complete()


def _all_pids() -> Iterator[int]:
    return (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())


def _bytes_of(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _parent(pid: int) -> int:
    fields = _bytes_of(pid, "stat").rpartition(b")")[2].split()
    return int(fields[1]) if fields else 0


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
