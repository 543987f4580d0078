"""A soak: millions of steps in runs that come and go, connections that are torn, an aggregator that is killed.

    python benchmarks/faults/soak.py [--minutes 60] [--json FILE]

One rank trains at full speed, run after run in one process. In each run its connection is torn in the middle of a
message, and in many the aggregator is killed and started again. Rows in must be rows stored, each once,
or be reported as lost; memory, threads, descriptors and files must not grow. Exits with 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from relay import Relay
from tests.aggregator.conftest import TOKEN, Serving
from tests.eventually import eventually

from traceml.database.schema import TABLES
from traceml.database.store.reader import StoreReader
from traceml.run_folder import STORE_NAME

RANK = Path(__file__).resolve().with_name("soaking_rank.py")
_LONGEST_RUN_S = 30.0
_RUNS_AT_LEAST = 5
_RING_ROWS = 1 << 20  # a minute at full speed
# Of memory that is not mapped from files, after a third of the soak: caches have their bounds by then.
_GROWTH_BYTES = 16 << 20
_GROWTH_SHARE = 0.05


@dataclass
class SoakedRun:
    """A run of the soak, and the sizes after it.

    Attributes:
        seconds: since the start of the soak.
        steps, logged, rows: as the rank counted them.
        stored_steps, stored_logged, stored_rows, lost_rows: as the store has and reports them.
        reconnects: of the rank.
        restarts: of the aggregator so far.
        rank_bytes, rank_threads, rank_descriptors: of the training process.
        server_bytes, server_threads, server_descriptors: of the aggregator.
        files: in the runs folder without this run, and flight files.
    """

    seconds: float
    steps: int
    logged: int
    rows: int
    stored_steps: int
    stored_logged: int
    stored_rows: int
    lost_rows: int
    reconnects: int
    restarts: int
    rank_bytes: int
    rank_threads: int
    rank_descriptors: int
    server_bytes: int
    server_threads: int
    server_descriptors: int
    files: int

    @property
    def wrong(self) -> Iterator[str]:
        """Counts that do not fit."""
        if self.stored_steps > self.steps or self.stored_logged != self.logged:
            yield f"{self.stored_steps} of {self.steps} steps and {self.stored_logged} of {self.logged} values stored"

        if self.stored_rows + self.lost_rows != self.rows:
            yield f"{self.stored_rows} stored + {self.lost_rows} reported as lost are not {self.rows} rows"


class Soak:
    """A rank, an aggregator, and a relay between them.

    Args:
        folder: an empty folder.
        run_s: seconds of a run.
    """

    def __init__(self, folder: Path, run_s: float) -> None:
        self.folder, self.run_s = folder, run_s
        self.serving = Serving(folder / "runs", folder / "serve.log")
        self.relay = Relay(self.serving.port)
        self.restarts = 0
        self.began = time.monotonic()
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TRACEML")}
        own = {
            "TRACEML_HOST": "127.0.0.1", "TRACEML_PORT": str(self.relay.port), "TRACEML_TOKEN": TOKEN,
            "TRACEML_RUNS_DIR": str(folder / "runs"), "TRACEML_RING_ROWS": str(_RING_ROWS), "OMP_NUM_THREADS": "1",
            "TRACEML_COLLECTORS": "", "XDG_CONFIG_HOME": str(folder),
        }  # fmt: skip
        self.rank = subprocess.Popen(
            [sys.executable, str(RANK), str(run_s)], env=kept | own, cwd=folder,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, *, kills: bool) -> SoakedRun:
        """Disturb the next run, and return what came of it."""
        disturbance = threading.Thread(target=self._disturb, args=(kills,))
        disturbance.start()
        self._tell("go")
        disturbance.join()
        self._tell("end")  # not before: nobody would write the report of an aggregator that is killed after the end
        counts = json.loads(_line_of(self.rank.stdout))
        run_dir = Path(counts.pop("run_dir"))
        server = self.serving.process.pid
        eventually(lambda: _has_report(run_dir, server), f"the report of {run_dir}", timeout_s=100)
        found = self._measured(run_dir, counts)
        # The aggregator may just open the store once more, to merge its log into it.
        eventually(lambda: _is_removed(run_dir), f"{run_dir} to be removed")
        return found

    def close(self) -> None:
        """End the rank and the aggregator."""
        self.rank.kill()
        self.rank.communicate()
        self.serving.close()

    def _tell(self, word: str) -> None:
        """Give a line to the rank."""
        assert self.rank.stdin is not None
        self.rank.stdin.write(f"{word}\n")
        self.rank.stdin.flush()

    def _disturb(self, kills: bool) -> None:
        time.sleep(self.run_s / 4)
        self.relay.tear_for(self.run_s / 8)
        if kills:
            self.serving.kill()
            time.sleep(self.run_s / 8)
            self.serving.start()
            self.restarts += 1

    def _measured(self, run_dir: Path, counts: dict[str, int]) -> SoakedRun:
        with StoreReader(run_dir / STORE_NAME) as reader:
            stored = {name: reader.stored(name) for name in TABLES}
            lost = sum(reader.lost(name) for name in TABLES)
            steps = reader.rows("steps")["step"]

        assert len(set(steps.tolist())) == len(steps), "steps are stored twice"
        server = Path(f"/proc/{self.serving.process.pid}")
        status = dict(line.split(":", 1) for line in (server / "status").read_text().splitlines())
        return SoakedRun(
            seconds=time.monotonic() - self.began,
            steps=counts["steps"],
            logged=counts["logged"],
            rows=counts["rows"],
            stored_steps=stored["steps"],
            stored_logged=stored["metrics"],
            stored_rows=sum(stored.values()),
            lost_rows=lost,
            reconnects=counts["reconnects"],
            restarts=self.restarts,
            rank_bytes=counts["rss"],
            rank_threads=counts["threads"],
            rank_descriptors=counts["descriptors"],
            server_bytes=int(status["RssAnon"].split()[0]) * 1024,
            server_threads=int(status["Threads"]),
            server_descriptors=len(list((server / "fd").iterdir())),
            files=_files(run_dir.parent, run_dir, self.rank.pid),
        )


def _line_of(stream: IO[str] | None) -> str:
    assert stream is not None
    line = stream.readline()
    assert line, "the rank has ended"
    return line


def _has_report(run_dir: Path, pid: int) -> bool:
    """Whether a run is over, its report written and its store closed."""
    opened = {_target(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
    return (run_dir / "report.html").exists() and not any(str(run_dir) in path for path in opened)


def _is_removed(folder: Path) -> bool:
    """Remove a folder; return whether it is gone."""
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def _target(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""


def _files(runs_dir: Path, run_dir: Path, pid: int) -> int:
    others = [path for path in runs_dir.rglob("*") if run_dir not in (path, *path.parents)]
    flights = Path("/dev/shm").glob(f"traceml-*/*{pid}*")
    return len(others) + len(list(flights))


@contextmanager
def soaking(run_s: float) -> Iterator[Soak]:
    """Make a soak in a folder that is removed at the end."""
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), run_s)
        try:
            yield soak
        finally:
            soak.close()


def soaked(minutes: float) -> list[SoakedRun]:
    """Soak for so long; return all runs."""
    run_s = min(_LONGEST_RUN_S, minutes * 60 / (_RUNS_AT_LEAST + 2))
    runs: list[SoakedRun] = []
    with soaking(run_s) as soak:
        while len(runs) < _RUNS_AT_LEAST or time.monotonic() - soak.began < minutes * 60:
            # None in the last third: how the aggregator grows can be seen there.
            is_early = time.monotonic() - soak.began < minutes * 40
            runs.append(soak.run(kills=len(runs) == 1 or (len(runs) % 3 == 1 and is_early)))
            print(line(runs[-1]), flush=True)

    return runs


def line(run: SoakedRun) -> str:
    """Return a run as a line of the table."""
    return (
        f"{run.seconds:7.0f} {run.steps:9,} {run.rows:10,} {run.stored_rows:10,} {run.lost_rows:8,} "
        f"{run.reconnects:5} {run.restarts:5} "
        f"{run.rank_bytes / 1e6:8.1f} {run.rank_threads:3} {run.rank_descriptors:4} "
        f"{run.server_bytes / 1e6:8.1f} {run.server_threads:3} {run.server_descriptors:4} {run.files:5}"
    )


HEAD = (
    "seconds     steps    rows in     stored     lost recon resta  rank MB thr  fds"
    "  aggr MB thr  fds files"
)  # fmt: skip


def growth(runs: list[SoakedRun]) -> Iterator[str]:
    """Yield what has grown: of the rank since the first third of a soak, of the aggregator since its last start."""
    mine = runs[max(2, len(runs) // 3) - 1 :]
    restarted = next(i for i, run in enumerate(runs) if run.restarts == runs[-1].restarts)
    servers = runs[min(restarted + 1, len(runs) - 3) :]
    for name, since in (("rank_bytes", mine), ("server_bytes", servers)):
        before, now = getattr(since[0], name), min(getattr(run, name) for run in since[-2:])
        if now > before * (1 + _GROWTH_SHARE) + _GROWTH_BYTES:
            yield f"{name} grew from {before / 1e6:.1f} to {now / 1e6:.1f} MB"

    for owner, since in (("rank", mine), ("server", servers)):
        for name in (f"{owner}_threads", f"{owner}_descriptors", "files"):
            before = max(getattr(run, name) for run in since[:2])
            now = min(getattr(run, name) for run in since[-2:])
            if now > before:
                yield f"{name} grew from {before} to {now}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--json", type=Path, help="write all figures")
    options = parser.parse_args()
    print(HEAD)
    runs = soaked(options.minutes)
    wrong = [f"after {run.seconds:.0f} s: {text}" for run in runs for text in run.wrong] + list(growth(runs))
    print(
        f"{len(runs)} runs, {sum(run.steps for run in runs):,} steps, {sum(run.rows for run in runs):,} rows in, "
        f"{sum(run.stored_rows for run in runs):,} stored, {sum(run.lost_rows for run in runs):,} reported as lost; "
        f"{sum(run.reconnects for run in runs)} reconnects, {runs[-1].restarts} restarts of the aggregator"
    )
    for text in wrong:
        print(f"WRONG: {text}")

    if options.json:
        options.json.write_text(json.dumps([asdict(run) for run in runs]))

    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
