"""Traced launches over real hosts: one report, whatever happens to ranks, the aggregator, or the terminal's owner."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.eventually import eventually
from tests.launch.hosts import Hosts, Slurm
from tests.processes import command_of
from traceml.run_folder import AGGREGATOR_LOG
from traceml.runs.run import load_run

# DDP and optimizers import torch._dynamo, which takes as long as torch itself: trainings that can do without have none.
# In "gil", the aggregator has come to know the ranks by then.
TRAIN = """
import contextlib, ctypes, os, sys, time
import torch, traceml
import torch.distributed as dist

def deep(frames, crash):
    return deep(frames - 1, crash) if frames else crash()

what, steps = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model, optimizer = torch.nn.Linear(8, 8), None
if what in ("train", "gil"):
    model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
data = torch.utils.data.TensorDataset(torch.randn(steps * 4, 8))
print("rank", rank, "of", dist.get_world_size(), __name__, sys.argv[1:], flush=True)
print("complaint of rank", rank, file=sys.stderr, flush=True)
for step, (batch,) in enumerate(torch.utils.data.DataLoader(data, batch_size=4)):
    with contextlib.nullcontext() if optimizer else traceml.trace_step():
        if what == "kill" and rank == 1 and step == 30:
            with traceml.phase("augment"):
                os.kill(os.getpid(), 9)
        if what == "exit" and rank == 1 and step == 30:
            sys.exit(5)
        if what == "leave" and rank == 1 and step == 30:
            sys.exit()
        if what == "gil" and rank == dist.get_world_size() - 1 and step == 30:
            ctypes.PyDLL(None).sleep(600)
        if what == "crash" and rank == 1 and step == 30:
            deep(60, lambda: ctypes.string_at(0))
        model(batch).sum().backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
        else:
            dist.all_reduce(model.weight.grad)
        if what == "slow":
            open(f"at-{rank}", "w").write(str(step))
            time.sleep(0.02)
dist.destroy_process_group()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(TRAIN)
    return tmp_path


def command(hosts: Hosts, *words: str, names: Sequence[str] = ("node1", "alias2"), ranks: int = 2) -> list[str | Path]:
    """Return the command that launches `ranks` ranks, on as few hosts as the test needs: each imports torch."""
    workers = str(ranks // len(names))
    options = ["--hostnames", *names, "--ssh-config-file", hosts.ssh_config, "--workers-per-host", workers]
    return [sys.executable, "-m", "traceml", "launch", *options, *words]


def launched(hosts: Hosts, folder: Path, *words: str, **where: Any) -> subprocess.CompletedProcess[str]:
    return hosts.launcher.run(*command(hosts, *words, **where), check=False, cwd=folder)


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "traceml_runs" / "latest" / "report.json").read_text())
    return report


def wait_until_clean(hosts: Hosts) -> None:
    """Wait until nothing runs on a host: an agent that starts while its launcher gives up is not waited for."""
    eventually(lambda: not any(hosts[name].processes() for name in hosts.names), "the hosts to be clean")


def test_a_stopped_terminal_does_not_stop_the_launch(folder: Path) -> None:
    """Nobody reads it, as after Ctrl-S; agents of other hosts took a launcher that waited for it for a lost one."""
    (folder / "talk.py").write_text(
        "import atexit, pathlib, time\natexit.register(pathlib.Path('released').touch)\n"
        "print('word\\n' * 10_000)\ntime.sleep(2)\n"  # meanwhile the terminal is full
    )
    command = [sys.executable, "-m", "traceml", "launch", "--hostnames", "localhost", "--workers-per-host", "1"]
    terminal, end = pty.openpty()
    job = subprocess.Popen(
        [*command, "--live", "terminal", "talk.py"],
        cwd=folder,
        stdin=end,
        stdout=end,
        stderr=end,
        start_new_session=True,
    )
    os.close(end)
    try:
        eventually((folder / "released").exists, "the launcher to release the rank")
    finally:
        shown = b""
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while data := os.read(terminal, 65536):
                shown += data

        os.close(terminal)

    assert job.wait(240) == 0
    assert shown.count(b"word") == 10_000


def test_a_script_is_traced_on_all_hosts(hosts: Hosts, folder: Path) -> None:
    """Ranks of other hosts reach the aggregator through the channel; output, report and status are as with run."""
    done = launched(hosts, folder, "--report", "copy.json", "train.py", "train", "60", "--hostnames", "x")

    assert done.returncode == 0, done.stderr
    assert done.stdout == "rank 0 of 2 __main__ ['train', '60', '--hostnames', 'x']\n"
    assert done.stderr.startswith("traceml: tracing this run; results in traceml_runs/")
    assert "complaint of rank 0\n" in done.stderr
    report = json.loads((folder / "copy.json").read_text())
    assert report["run"]["state"] == "finished"
    assert report["run"]["hosts"] == ["node1", "node2"]
    assert "train.py train 60" in report["run"]["command"]
    assert [(rank["host"], rank["steps"], rank["state"]) for rank in report["ranks"]] == [
        ("node1", 60, "finished"),
        ("node2", 60, "finished"),
    ]
    assert report["telemetry"]["rows_lost"] == 0
    assert report["verdict"]["summary"].split()[0] in done.stderr
    (log,) = folder.glob("traceml_logs/*/alias2*0*.log")
    assert "rank 1 of 2" in log.read_text()
    wait_until_clean(hosts)


def test_a_killed_rank_of_another_host_is_explained_by_its_flight_file(hosts: Hosts, folder: Path) -> None:
    """Unsent rows are fetched from its host's memory: every step, and the step and phase that were open."""
    done = launched(hosts, folder, "train.py", "kill", "100")

    assert done.returncode == 128 + signal.SIGKILL
    assert "rank 1 (local rank 0 on alias2) was killed by signal 9" in done.stderr
    verdict = report_of(folder)["verdict"]
    assert (verdict["kind"], verdict["ranks"], verdict["phase"]) == ("RANK_LOST", [1], "augment")
    assert (verdict["evidence"]["signal"], verdict["evidence"]["step"]) == (9, 30)
    steps = load_run(folder / "traceml_runs" / "latest").steps()
    assert steps["step"][steps["rank"] == 1].tolist() == [*range(30)]
    assert list((folder / "traceml_runs" / "latest").glob("flights/*")) == []
    left = hosts["node2"].run("find", "/dev/shm", "-name", "*.flight").stdout
    assert left == ""
    wait_until_clean(hosts)


def test_a_crash_is_reported_with_the_line_of_the_script(hosts: Hosts, folder: Path) -> None:
    """faulthandler of a worker writes to its output, 60 frames of it; the report has the line as under `run`."""
    done = launched(hosts, folder, "train.py", "crash", "100", names=["alias2"])

    assert done.returncode == 128 + signal.SIGSEGV
    verdict = report_of(folder)["verdict"]
    assert (verdict["kind"], verdict["ranks"], verdict["evidence"]["signal"]) == ("RANK_LOST", [1], 11)
    line = next(n for n, text in enumerate(TRAIN.splitlines(), 1) if "string_at" in text)
    assert f"in C code called at train.py:{line}" in verdict["summary"]


def test_the_status_is_that_of_the_rank_that_failed(hosts: Hosts, folder: Path) -> None:
    """A module is launched like a script; a rank that leaves by sys.exit is the cause, not those that missed it."""
    done = launched(hosts, folder, "-m", "train", "exit", "100", names=["alias2"])

    assert done.returncode == 5
    verdict = report_of(folder)["verdict"]
    assert (verdict["kind"], verdict["ranks"], verdict["evidence"]["code"]) == ("RANK_LOST", [1], 5)


# `traceml launch` whose end, in which it holds interrupts, begins when the test has sent the second one.
INTERRUPTED = """
import contextlib, sys, time
from pathlib import Path
from traceml.cli import main
from traceml.launch.launcher.job import job

@contextlib.contextmanager
def held(begin=job.interrupts_held):
    with begin():
        Path("held").touch()
        while not Path("again").exists():
            time.sleep(0.01)

        yield

job.interrupts_held = held
sys.exit(main(sys.argv[1:]))
"""


def steps_seen(folder: Path) -> int:
    """Return the newest step that both ranks of a `slow` training have begun."""
    files = [folder / f"at-{rank}" for rank in (0, 1)]
    return min(int(file.read_text() or 0) for file in files) if all(file.exists() for file in files) else 0


def interrupted(process: subprocess.Popen[str], folder: Path, meanwhile: Callable[[], object]) -> tuple[str, str]:
    """Press Ctrl-C twice, with a call in between, in a job that runs as `INTERRUPTED`; return what it has written."""
    os.killpg(process.pid, signal.SIGINT)
    eventually((folder / "held").exists, "the end of the job has begun")
    meanwhile()
    os.killpg(process.pid, signal.SIGINT)  # a second one does not cut it short
    (folder / "again").touch()
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 130, errors
    return out, errors


def test_an_aggregator_that_dies_costs_no_row(hosts: Hosts, folder: Path) -> None:
    """Its successor takes over, and ranks find it by the same way through the channel; then Ctrl-C ends everything."""
    python, _, _, *words = command(hosts, "train.py", "slow", "100000")
    process = hosts.launcher.start(python, "-c", INTERRUPTED, *words, cwd=folder)

    def aggregator() -> psutil.Process | None:
        found = (each for each in hosts.launcher.processes() if "serve" in command_of(each))
        return next(found, None)  # what it starts has the same words for a moment

    eventually(lambda: steps_seen(folder) > 20, "some steps")
    eventually(aggregator).kill()
    at = steps_seen(folder)
    eventually(lambda: steps_seen(folder) > at + 20 and aggregator(), "more steps, and another aggregator")
    out, errors = interrupted(process, folder, lambda: None)

    assert out.startswith("rank 0 of 2")
    assert " here:\n" in errors  # where each rank was
    assert "train.py" in errors.partition(" here:\n")[2]
    assert "recorder/recorder_thread.py" not in errors  # threads of ours are nobody's business
    report = report_of(folder)
    assert report["run"]["state"] == "stopped", (
        errors + (folder / "traceml_runs" / "latest" / AGGREGATOR_LOG).read_text()
    )
    assert report["telemetry"]["rows_lost"] == 0
    assert [rank["steps"] > at for rank in report["ranks"]] == [True, True]
    assert report["verdict"]["kind"] != "RANK_LOST"  # it was stopped by hand
    wait_until_clean(hosts)


def test_a_host_that_is_lost_while_the_job_is_stopped_is_no_failure(hosts: Hosts, folder: Path) -> None:
    """Its ranks were asked to end, as the others: nobody can say how they did."""
    python, _, _, *words = command(hosts, "train.py", "slow", "100000")
    process = hosts.launcher.start(python, "-c", INTERRUPTED, *words, cwd=folder)
    eventually(lambda: steps_seen(folder) > 20, "some steps")

    def lose_host() -> None:
        for each in hosts["node2"].processes():
            if command_of(each)[-1:] == ["traceml-agent"]:
                each.kill()

    _, errors = interrupted(process, folder, lose_host)

    report = report_of(folder)
    assert report["run"]["state"] == "stopped", errors
    assert report["verdict"]["kind"] != "RANK_LOST"
    wait_until_clean(hosts)


def test_a_traced_function_keeps_its_exception(hosts: Hosts, folder: Path) -> None:
    """With trace=True a function's error is raised as without, and the report says where it came from."""
    code = f"""
import traceml
def train(n):
    import os
    assert traceml.is_enabled()
    if os.environ["RANK"] == "1":
        raise KeyError("no such thing")
    return n
try:
    traceml.launch(train, (3,), hostnames=["node2"], workers_per_host=2,
                   ssh_config_file={str(hosts.ssh_config)!r}, trace=True)
except KeyError as error:
    print("raised", error.args)
"""
    (folder / "script.py").write_text(code)
    done = hosts.launcher.run(sys.executable, "script.py", cwd=folder)

    assert "raised ('no such thing',)" in done.stdout
    assert "KeyError" in done.stderr
    verdict = report_of(folder)["verdict"]
    assert (verdict["kind"], verdict["ranks"]) == ("RANK_LOST", [1])
    assert verdict["evidence"]["file"].endswith("script.py")
    wait_until_clean(hosts)


def test_a_launch_that_reaches_no_host_leaves_no_run(hosts: Hosts, folder: Path) -> None:
    """Without workers there is nothing to report; the exit status shows that a host failed."""
    words = ["--hostnames", "node1", "refused", "--ssh-config-file", hosts.ssh_config, "train.py", "train", "1"]
    done = hosts.launcher.run(sys.executable, "-m", "traceml", "launch", *words, check=False, cwd=folder)

    assert done.returncode == 3
    assert done.stderr.startswith("traceml launch: host refused: the connection was refused")
    assert [each.name for each in (folder / "traceml_runs").iterdir()] == [".gitignore"]
    wait_until_clean(hosts)


def test_an_allocation_of_slurm_needs_no_names(slurm: Slurm, folder: Path) -> None:
    """Under salloc, srun carries the channel and the tunnel, and the job's nodes are used."""
    words = [sys.executable, "-m", "traceml", "launch", "--workers-per-host", "1", "train.py", "plain", "30"]
    done = slurm.run("salloc", "--quiet", "-N2", *words, cwd=folder)

    assert done.stdout == "rank 0 of 2 __main__ ['plain', '30']\n"
    report = report_of(folder)
    assert [(rank["host"], rank["steps"]) for rank in report["ranks"]] == [("node1", 30), ("node2", 30)]
    wait_until_clean(slurm.hosts)


@pytest.mark.timeout(200)
def test_a_rank_of_another_host_that_cannot_answer_has_a_snapshot_from_there(hosts: Hosts, folder: Path) -> None:
    """It holds the GIL: its host's agent tells its line, and the hung job is ended."""
    ended = hosts.launcher.run(
        *command(hosts, "--kill-after-report", "train.py", "gil", "60", names=["alias2"]),
        env={"TRACEML_HANG_TIMEOUT": "8"},
        cwd=folder,
        check=False,
    )
    verdict = report_of(folder)["verdict"]
    line = 1 + TRAIN.splitlines().index("            ctypes.PyDLL(None).sleep(600)")

    assert ended.returncode != 0
    assert (verdict["kind"], verdict["ranks"]) == ("HANG", [1]), verdict
    assert f"in C code called at train.py:{line}" in verdict["summary"]
    assert "that holds the GIL, sleeping" in verdict["summary"]


def test_a_script_that_is_over_while_others_wait_for_it_is_named(hosts: Hosts, folder: Path) -> None:
    """A launch holds its process until all may end, so no connection is closed: nobody would notice."""
    hosts.launcher.run(
        *command(hosts, "--kill-after-report", "train.py", "leave", "60"),
        env={"TRACEML_HANG_TIMEOUT": "8"},
        cwd=folder,
        check=False,
    )
    verdict = report_of(folder)["verdict"]

    assert (verdict["kind"], verdict["ranks"], verdict["evidence"]["cause"]) == ("HANG", [1], "ended"), verdict
    assert verdict["summary"].startswith("Rank 1's script ended after 30 steps; rank 0 waits for it in all_reduce")


def test_a_lone_rank_that_cannot_end_itself_is_ended_by_the_launcher(hosts: Hosts, folder: Path) -> None:
    """It holds the GIL, on a host of which only its agent can kill it."""
    ended = hosts.launcher.run(
        *command(hosts, "--kill-after-report", "train.py", "gil", "60", names=["alias2"], ranks=1),
        env={"TRACEML_HANG_TIMEOUT": "8"},
        cwd=folder,
        check=False,
    )
    report = report_of(folder)

    assert ended.returncode == 1
    assert "rank 0 (local rank 0 on alias2) has not ended: the job hangs, and on_hang is abort" in ended.stderr
    assert (report["run"]["state"], report["verdict"]["kind"], report["verdict"]["ranks"]) == ("hung", "HANG", [0])
    assert "that holds the GIL" in report["verdict"]["summary"]
    wait_until_clean(hosts)
