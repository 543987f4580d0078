"""`traceml profile` on real jobs, and on runs that have ended."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.eventually import eventually
from tests.forked import client as forked
from tests.runs.report.test_line_shares import line, report_with
from traceml import cli
from traceml.cli.assistants.json_documents import document_schema
from traceml.cli.profile import parse_ranks, profiled_text
from traceml.database.schema import StepFlag, unpack_bits
from traceml.database.store.reader import StoreReader
from traceml.errors import UsageError
from traceml.run_folder import REPORT_NAME, STORE_NAME
from traceml.runs.export.operator_trace import ProfiledRank
from traceml.runs.export.top_operators import CallSamples

# Trains until its standard input is closed; then all ranks agree on the last step.
TRAINING = """
import os, select, sys, time, torch, torch.distributed as dist
from torch import nn

dist.init_process_group("gloo")
torch.set_num_threads(1)
model = nn.parallel.DistributedDataParallel(nn.Linear(64, 64))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)


def step(x):
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    time.sleep(0.01)  # leaves the cores to the commands that are tested


data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(1024, 64)), batch_size=16)
going = True
while going:
    for (x,) in data:
        step(x)

    stop = torch.tensor(float(os.path.exists("stop")))
    dist.all_reduce(stop)
    going = not stop.item()
"""


class _RunningJob:
    """A job of two ranks that trains until it is told to stop."""

    def __init__(self, folder: Path, code: str, *options: str) -> None:
        self.folder = folder
        (folder / "train.py").write_text(code)
        command = [sys.executable, "-m", "traceml", "run", "--live", "none", "--runs-dir", "runs", *options, "train.py"]
        self.process = forked.Popen(
            command, forks=True, cwd=folder, env=_environ(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    @property
    def run_dir(self) -> Path:
        (store,) = (self.folder / "runs").glob(f"2*/{STORE_NAME}")
        return store.parent

    def steps(self, rank: int) -> Any:
        """Return the stored steps of a rank."""
        with StoreReader(self.run_dir / STORE_NAME) as reader:
            streams = [each.id for each in reader.streams() if each.rank == rank]
            return reader.rows("steps", streams)

    def await_steps(self, ranks: int = 2) -> None:
        def trains() -> bool:
            found = list((self.folder / "runs").glob(f"2*/{STORE_NAME}"))
            return bool(found) and all(len(self.steps(rank)) > 20 for rank in range(ranks))

        eventually(trains, "the training")

    def pids(self) -> dict[int, int]:
        with StoreReader(self.run_dir / STORE_NAME) as reader:
            return {each.rank: each.identity.pid for each in reader.streams()}

    def profile(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "traceml", "profile", "--runs-dir", "runs", *words]
        return forked.run(command, cwd=self.folder, capture_output=True, text=True, env=_environ(), timeout=240)

    def finish(self) -> None:
        (self.folder / "stop").touch()
        _, errors = self.process.communicate(timeout=240)
        assert self.process.returncode == 0, errors


def _environ() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("TRACEML_")}
    return kept | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., _RunningJob]]:
    jobs: list[_RunningJob] = []

    def begin(code: str = TRAINING, *options: str, ranks: int = 2) -> _RunningJob:
        jobs.append(_RunningJob(tmp_path, code, "--nproc-per-node", str(ranks), *options))
        jobs[-1].await_steps(ranks)
        return jobs[-1]

    yield begin
    for job in jobs:
        if job.process.poll() is None:
            job.process.send_signal(signal.SIGTERM)

        with job.process:  # closes its pipe, also where it has ended by itself
            job.process.wait(240)


def _spans(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [each for each in events if each["ph"] == "X" and each["name"].startswith(name)]


def _overlap_us(one: dict[str, Any], other: dict[str, Any]) -> float:
    end = min(each["ts"] + each["dur"] for each in (one, other))
    return float(end - max(one["ts"], other["ts"]))


def _profiled_steps(job: _RunningJob) -> tuple[list[int], int]:
    """Return the steps of rank 0 that were profiled, and its last one."""
    rows = job.steps(0)
    steps: list[int] = rows["step"][unpack_bits(rows["bits"]).flags & StepFlag.PROFILED > 0].tolist()
    return steps, int(rows["step"].max())


def _was_profiled(job: _RunningJob) -> bool:
    steps, last = _profiled_steps(job)
    return bool(steps) and steps[-1] < last


@pytest.mark.process
def test_ranks_of_a_running_job_are_profiled(start: Callable[..., _RunningJob]) -> None:
    """One file: processes named after ranks, our phases above the operators, the same steps on each rank."""
    job = start()
    told = job.profile("--steps", "4", "--json", "-o", "out.json.gz")
    assert told.returncode == 0, told.stderr
    result = json.loads(told.stdout)
    eventually(lambda: _was_profiled(job), "a step that is not profiled any more")
    job.finish()

    jsonschema.validate(result, document_schema("profile"))
    assert [each["rank"] for each in result["ranks"]] == [0, 1]
    first = result["ranks"][0]["first_step"]
    assert {(each["first_step"], each["steps"]) for each in result["ranks"]} == {(first, 4)}
    assert all(each["slowdown"] > 0 for each in result["ranks"])
    assert result["missing"] == []

    events = json.loads(gzip.decompress((job.folder / "out.json.gz").read_bytes()))["traceEvents"]
    names = [each["args"]["name"] for each in events if each["ph"] == "M" and each["name"] == "process_name"]
    assert [name.partition(" (")[0] for name in names] == ["rank 0", "rank 1"]
    for pid in (1, 2):
        mine = [each for each in events if each["pid"] == pid]
        steps = {each["name"].removeprefix("step "): each for each in _spans(mine, "step ")}
        marks = {each["name"].removeprefix("ProfilerStep#"): each for each in _spans(mine, "ProfilerStep#")}
        assert set(steps) == set(marks) == {str(first + n) for n in range(4)}
        for number, mark in marks.items():  # the first one begins with the profiler, which starts before its step
            shared = {other: _overlap_us(mark, step) for other, step in steps.items()}
            assert shared[number] == max(shared.values()) > 0

        assert _spans(mine, "aten::addmm")
        assert _spans(mine, "backward")

    tracks = {(each["pid"], each["tid"]) for each in events if each["ph"] == "X"}
    assert len({tid for _, tid in tracks}) == len(tracks)

    operators = {each["name"]: each for each in result["operators"]}
    assert operators["aten::addmm"]["calls_per_step"] == 1
    assert operators["aten::addmm"]["self_cpu_ms"] > 0
    flagged, last = _profiled_steps(job)
    assert flagged[:6] == list(range(first - 1, first + 5))  # more until the trace is written
    assert flagged == list(range(first - 1, flagged[-1] + 1))
    assert flagged[-1] < last


@pytest.mark.process
def test_a_job_is_asked_to_be_profiled_by_itself(start: Callable[..., _RunningJob]) -> None:
    """Its aggregator says where the profile will be."""
    job = start()
    told = job.profile("--on-finding")
    job.finish()

    assert told.returncode == 0, told.stderr
    assert told.stdout == (
        f"Run {job.run_dir.name} is profiled once computation has been its verdict for 60 s: "
        f"{job.run_dir / 'profile.json.gz'}\n"
    )


@pytest.mark.process
def test_one_rank_is_profiled_twice(start: Callable[..., _RunningJob]) -> None:
    """A trace that was fetched is in nobody's way; the text names operators, lines, the slow-down and the file."""
    job = start()
    for _ in range(2):
        told = job.profile("--ranks", "1", "--steps", "100")
        assert told.returncode == 0, told.stderr

    unknown = job.profile("--ranks", "0,7")
    job.finish()

    assert "aten::addmm" in told.stdout
    assert "train.py:" in told.stdout
    assert "while profiled" in told.stdout
    assert "Rank 1, steps " in told.stdout
    assert list(job.folder.glob("*.profile.json.gz"))
    assert unknown.returncode == 3
    assert "no rank 7 is connected; there are ranks 0-1" in unknown.stderr.replace("ranks 0, 1", "ranks 0-1")


@pytest.mark.process
def test_a_trace_above_the_limit_is_refused(start: Callable[..., _RunningJob]) -> None:
    """The words name size, limit, and what to do."""
    job = start()
    told = job.profile("--ranks", "0", "--steps", "300", "--limit-mb", "1")
    job.finish()

    assert told.returncode == 3
    assert "and the limit is 1.00 MiB: profile fewer steps" in told.stderr


@pytest.mark.process
def test_a_rank_that_dies_is_reported(start: Callable[..., _RunningJob]) -> None:
    """Nobody waits for its trace."""
    job = start()
    command = [sys.executable, "-m", "traceml", "profile", "--runs-dir", "runs", "--steps", "1000", "--timeout", "60"]
    asked = forked.Popen(command, cwd=job.folder, stderr=subprocess.PIPE, text=True, env=_environ())
    flags = StepFlag.PROFILED
    eventually(lambda: (unpack_bits(job.steps(1)["bits"]).flags & flags > 0).any(), "the window")
    os.kill(job.pids()[1], signal.SIGKILL)
    _, errors = asked.communicate(timeout=240)

    assert asked.returncode == 3
    assert "rank 1: it ended while it was profiled" in errors


@pytest.mark.process
def test_a_job_that_makes_no_step_is_reported(start: Callable[..., _RunningJob]) -> None:
    """After the time limit; the training goes on without a profiler."""
    code = TRAINING.replace("        step(x)\n", "        step(x)\n        pause()\n").replace(
        "data =",
        "def pause():\n    import time\n    while os.path.exists('pause'):\n        time.sleep(0.05)\n\n\ndata =",
    )
    job = start(code)
    (job.folder / "pause").touch()
    told = job.profile("--timeout", "3")
    (job.folder / "pause").unlink()
    job.finish()

    assert told.returncode == 3
    assert "its steps did not end within 3 s" in told.stderr


@pytest.mark.process
def test_a_profiler_of_the_script_is_reported(start: Callable[..., _RunningJob]) -> None:
    """It is refused with a word, and the script's goes on."""
    code = TRAINING.replace("going = True", "own = torch.profiler.profile()\nown.start()\ngoing = True")
    job = start(code)
    told = job.profile("--ranks", "0")

    assert told.returncode == 3
    assert "rank 0: the script runs a profiler of its own" in told.stderr


@pytest.mark.parametrize(("first", "expected"), [(198, "Ranks 0, 1, steps 198-202"), (33, "Ranks 0, 1")])
def test_steps_are_told_of_all_ranks_or_of_none(first: int, expected: str) -> None:
    """Ranks that share no collective are not in the same step."""
    steps = {"host": "node1", "pid": 1, "steps": 5, "data": b"", "calls": CallSamples()}
    traces = [ProfiledRank(rank=0, first_step=198, **steps), ProfiledRank(rank=1, first_step=first, **steps)]

    assert profiled_text(traces) == expected


def test_bad_arguments_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    """Ranks, steps and extensions."""
    assert parse_ranks("0-2, 7") == (0, 1, 2, 7)
    assert parse_ranks(None) is None
    for text in ("x", "3-1", "", "0-"):
        with pytest.raises(UsageError, match="0,3 or 0-3"):
            parse_ranks(text)

    assert cli.main(["profile", "-o", "x.png"]) == 2
    assert cli.main(["profile", "--steps", "0"]) == 2
    assert cli.main(["profile", "--cpu", "-o", "x.png"]) == 2
    assert cli.main(["profile", "--on-finding", "--steps", "7"]) == 2
    assert cli.main(["profile", "--cpu", "--ranks", "1"]) == 2
    assert "FILE.html" in capsys.readouterr().err


def test_no_job_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The words say how to start one."""
    monkeypatch.setenv("TRACEML_PORT", "1")  # not that of an aggregator that runs beside the tests
    assert cli.main(["profile", "--runs-dir", str(tmp_path)]) == 3
    assert "no job is running in" in capsys.readouterr().err


def test_sampled_lines_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a page, or as JSON for speedscope; without samples the words say why there are none."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / STORE_NAME).touch()
    report = report_with(line("forward", 30, 1.0))
    report.run.state = "finished"
    (run_dir / REPORT_NAME).write_text(report.to_json())
    page, graph = tmp_path / "x.html", tmp_path / "x.json"

    assert cli.main(["profile", str(run_dir), "--cpu", "-o", str(page)]) == 0
    assert "flame graph of 30 samples. Open it in a browser" in capsys.readouterr().out
    assert "train.py:7" in page.read_text()
    assert cli.main(["profile", str(run_dir), "--cpu", "-o", str(graph), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"run": "run", "file": str(graph), "samples": 30}
    assert json.loads(graph.read_text())["profiles"][0]["type"] == "sampled"
    assert cli.main(["profile", str(run_dir), "--cpu", "-o", str(tmp_path / "no" / "x.html")]) == 3
    assert "Name a file that can be written" in capsys.readouterr().err

    report.lines = []
    (run_dir / REPORT_NAME).write_text(report.to_json())
    assert cli.main(["profile", str(run_dir), "--cpu"]) == 3
    assert "`stack_interval` is 0" in capsys.readouterr().err
