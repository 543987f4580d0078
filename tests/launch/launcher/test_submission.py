"""Jobs that are submitted to a real Slurm through submitit: their results, their end by Slurm, and their next start."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.eventually import eventually
from tests.launch.hosts import Slurm
from traceml import cli
from traceml.errors import SlurmError, TraceMLError, UsageError
from traceml.launch.launcher.launcher import Launcher
from traceml.launch.launcher.submission.submitting import SlurmOptions

pytestmark = pytest.mark.timeout(400)  # jobs start one after the other, and each imports torch
_LONG_S = 150

_TRAIN = """
import os, signal, sys, time
from pathlib import Path
import torch, traceml

rank, done = int(os.environ["RANK"]), 0
torch.set_num_threads(1)
model = torch.nn.Linear(8, 1)  # without an optimizer: the first one imports for as long as torch itself
path = Path(f"saved-{rank}.pt")
if path.exists():
    done = torch.load(path)["steps"]

print("starts at", done, flush=True)
for step in range(done, done + 20 if Path("enough").exists() else 10_000):
    with traceml.trace_step():
        model(torch.randn(4, 8)).mean().backward(); time.sleep(0.02)
    if step % 20 == 19:
        torch.save({"model": model.state_dict(), "steps": step + 1}, path)
        if rank == 0 and step > 50:
            Path("trained").touch()
"""


@pytest.fixture
def slurm(slurm: Slurm) -> Iterator[Slurm]:
    """The Slurm of all tests, without the jobs of this one after it."""
    yield slurm
    slurm.run("scancel", "--full", "--user=root")
    eventually(lambda: not slurm.run("squeue", "-h").stdout, "the queue to be empty", timeout_s=_LONG_S)


def submitted(slurm: Slurm, folder: Path, code: str, **environ: str) -> str:
    """Run a script of a user that submits, on the login node; return what it printed."""
    script = folder / "submit.py"
    script.write_text(code)
    python = slurm.hosts.launcher.command()[0]
    return slurm.run(python, script, cwd=folder, env=environ).stdout


def test_a_function_runs_on_the_nodes_of_the_job(slurm: Slurm, tmp_path: Path) -> None:
    """Each node's worker returns; the handle waits, and has the results by host."""
    told = submitted(
        slurm,
        tmp_path,
        """
import os, socket, traceml
def where(base, *, more): return socket.gethostname(), int(os.environ["RANK"]), base + more
job = traceml.Launcher(backend=None).submit(where, (1,), {"more": 2}, nodes=2, cpus_per_node=2, time="0:05:00")
print(job.result(timeout=240).results)
print(job.done, job.output.exists(), job.job_id.isdigit())
job.cancel()  # it has ended: nothing happens
""",
    )

    assert told.splitlines() == [
        "{'node1': [('node1', 0, 3)], 'node2': [('node2', 1, 3)]}",
        "True True True",
    ]


def test_an_error_is_raised_where_the_result_is_read(slurm: Slurm, tmp_path: Path) -> None:
    """It has its own type, its note names the rank, and Slurm knows that the job failed."""
    told = submitted(
        slurm,
        tmp_path,
        """
import traceml
from tests.eventually import eventually
def train(): raise ValueError("no data")
job = traceml.Launcher(backend=None).submit(train)
try:
    job.result(timeout=240)
except ValueError as error:
    print(error, "rank 0" in error.__notes__[0])
eventually(lambda: job.state not in ("RUNNING", "COMPLETING"), "the job's end")
print(job.state)
""",
        PYTHONPATH=str(Path(__file__).parents[3]),
    )

    assert told.splitlines() == ["no data True", "FAILED"]


def test_a_job_that_slurm_does_not_know_is_told_from_a_slurm_that_is_away(slurm: Slurm, tmp_path: Path) -> None:
    """By the words of a real one."""
    told = submitted(
        slurm,
        tmp_path,
        """
import os
from traceml.supervise.slurm_jobs import is_forgotten, read_job
print(read_job("999999"), is_forgotten("999999"))
os.environ["SLURM_CONF"] = "/no/such/file"
print(read_job("999999"), is_forgotten("999999"))
""",
    )

    assert told.splitlines() == ["None True", "None False"]


def launch(slurm: Slurm, folder: Path, *words: str, code: str = _TRAIN) -> str:
    """Submit the training by the command line; return the job's id."""
    (folder / "train.py").write_text(code)
    python = slurm.hosts.launcher.command()[0]
    told = slurm.run(python, "-m", "traceml", "launch", "--submit", *words, "train.py", cwd=folder).stdout
    assert "output: " in told, told
    return told.split()[2].rstrip(";")


def state(slurm: Slurm, job: str) -> str:
    shown = slurm.run("scontrol", "show", "job", job, "--oneliner").stdout
    return shown.partition("JobState=")[2].split()[0]


@pytest.mark.timeout(900)
def test_a_preempted_job_goes_on_as_the_next_attempt_of_its_run(slurm: Slurm, tmp_path: Path) -> None:
    """The first attempt's report names the preemption and the lost steps; the second goes on where it was saved."""
    job = launch(slurm, tmp_path, "--nodes", "2", "--partition", "spare", "--time", "10", "--sbatch", "exclusive")
    eventually((tmp_path / "trained").exists, "a checkpoint", timeout_s=_LONG_S)

    slurm.run("sbatch", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2", cwd=tmp_path)
    eventually(lambda: state(slurm, job) == "PENDING", "the job to be queued again", timeout_s=_LONG_S)

    run = (tmp_path / "traceml_runs" / "latest").resolve()
    report = json.loads((run / "report.json").read_text())
    lost = report["findings"][0]
    assert (lost["kind"], lost["evidence"]["cause"]) == ("RANK_LOST", "preempted")
    assert lost["summary"].startswith("The scheduler preempted the job (SIGTERM)")
    assert lost["evidence"]["lost_steps"] in range(21)  # 0 if it came right after a checkpoint

    (tmp_path / "enough").touch()

    def has_ended() -> bool:
        # Slurm gives the job a start two minutes later, perhaps once more when the last of its nodes is free. If that
        # is after an update, and the next one comes too late, these two minutes pass.
        slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
        return state(slurm, job) == "COMPLETED"

    eventually(has_ended, "the second attempt", timeout_s=3 * _LONG_S)

    report = json.loads((run / "report.json").read_text())
    assert len(list(run.parent.glob("*/report.json"))) == 2  # that of the run, and by the link `latest`
    assert len(report["run"]["restarts"]) == 1
    assert report["time"]["repeated_steps"] <= 20
    assert report["run"]["state"] == "finished"


@pytest.mark.parametrize(
    ("code", "status", "told"),
    [("print('trained')", 0, ""), ("import sys; sys.exit(7)", 7, "exit code 7"), ("raise KeyError('x')", 1, "'x'")],
)
def test_wait_ends_with_the_status_of_the_script(
    slurm: Slurm, tmp_path: Path, code: str, status: int, told: str
) -> None:
    """As `traceml launch` in an allocation does, so that a workflow goes on or stops; a status of Slurm says less."""
    (tmp_path / "train.py").write_text(code)
    words = (slurm.hosts.launcher.command()[0], "-m", "traceml", "launch", "--submit", "--wait", "train.py")
    ended = slurm.run(*words, cwd=tmp_path, check=False, timeout_s=_LONG_S)

    assert ended.returncode == status, ended.stderr
    assert "output: " in ended.stdout
    assert told in ended.stderr


@pytest.mark.parametrize("name", ["USR2", "TERM"])
def test_a_signal_of_slurm_reaches_the_function_alone(slurm: Slurm, tmp_path: Path, name: str) -> None:
    """Slurm sends it to all processes of the steps: the function saves, and the agents bring its result home."""
    told = submitted(
        slurm,
        tmp_path,
        f"""
import os, signal, subprocess, time, traceml
from pathlib import Path
from tests.eventually import eventually

def train():
    got = []
    signal.signal(signal.SIG{name}, lambda number, _: got.append(number))
    Path("ready" + os.environ["RANK"]).touch()
    while not got:
        time.sleep(0.05)
    return "saved"

job = traceml.Launcher(backend=None).submit(train, nodes=2)
eventually(lambda: len(list(Path().glob("ready*"))) == 2, "the function to run on both nodes")
subprocess.run(["scancel", "--signal={name}", job.job_id], check=True)
print(job.result(timeout=240).results)
""",
        PYTHONPATH=str(Path(__file__).parents[3]),
    )

    assert told.strip() == "{'node1': ['saved'], 'node2': ['saved']}"


def test_a_job_that_leaves_at_the_warning_is_queued_again(slurm: Slurm, tmp_path: Path) -> None:
    """It ends with a status of its own at Slurm's signal; the report names the warning."""
    code = f"import signal, sys\nsignal.signal(signal.SIGUSR2, lambda *_: sys.exit(7))\n{_TRAIN}"
    job = launch(slurm, tmp_path, "--time", "60", "--signal", "USR2@400", code=code)
    eventually((tmp_path / "trained").exists, "the training", timeout_s=_LONG_S)
    # The limit comes near only now, however long the start took: Slurm warns at once, two minutes before it.
    minutes = int((time.time() - (tmp_path / "train.py").stat().st_mtime) / 60) + 3
    slurm.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")

    latest = tmp_path / "traceml_runs" / "latest" / "report.json"
    eventually(
        lambda: state(slurm, job) == "PENDING" and latest.exists(),
        "it to be queued again",
        timeout_s=_LONG_S,
    )

    report = json.loads(latest.read_text())
    (lost,) = [finding for finding in report["findings"] if finding["kind"] == "RANK_LOST"]
    assert lost["evidence"]["cause"] == "warned"
    assert "and the job ended (exit code 7)" in lost["summary"]


def test_a_cancelled_job_has_no_result_and_is_not_queued_again(slurm: Slurm, tmp_path: Path) -> None:
    """The handle says so; waiting has a limit before."""
    told = submitted(
        slurm,
        tmp_path,
        """
import time, traceml
from pathlib import Path
from tests.eventually import eventually
def train():
    Path("ready").touch()
    time.sleep(100)
job = traceml.Launcher(backend=None).submit(train)
eventually(Path("ready").exists, "the function to run")
try:
    job.wait(timeout=0.1)
except TimeoutError as error:
    print(error)
job.cancel()
try:
    job.result(timeout=240)
except traceml.SlurmError as error:
    print(str(error).split(";")[0])
""",
        PYTHONPATH=str(Path(__file__).parents[3]),
    )

    waited, ended = told.splitlines()
    assert waited.endswith("is RUNNING after 0.1 s")
    ends = ("ended without a result (CANCELLED)", "the job was ended by SIGTERM", "the job was cancelled")
    assert ended.endswith(ends)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"nodes": 0}, "nodes=0: give a number of at least 1"),
        ({"retries": True}, "retries=True: give a number"),
        ({"time": "soon"}, "time='soon': give minutes, or a duration"),
        ({"time": 0}, "time=0: give minutes"),
        ({"signal": "USR2"}, "signal='USR2': give a name and seconds"),
    ],
)
def test_wrong_options_are_reported(values: dict[str, Any], words: str) -> None:
    """Before anything is submitted."""
    with pytest.raises(UsageError) as caught:
        Launcher().submit(print, **values)

    assert words in str(caught.value)


def test_options_become_those_of_sbatch() -> None:
    """Given ones alone; without retries Slurm does not queue the job again either."""
    found = SlurmOptions(nodes=2, time="1-0:30:00", gpus_per_node=8, sbatch={"constraint": "a100"}).parameters("train")

    assert found == {
        "job_name": "train",
        "time": 1470,
        "nodes": 2,
        "ntasks_per_node": 1,
        "gpus_per_node": 8,
        "use_srun": False,
        "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True, "signal": "USR2@120", "constraint": "a100"},
    }
    assert SlurmOptions(retries=0, signal="").parameters("x")["additional_parameters"] == {"no-requeue": True}


def test_what_is_missing_here_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """submitit with the command that installs it; then the programs of Slurm."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match="sbatch and srun are not on the PATH: submit from a login node"):
        Launcher().submit(print)

    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(TraceMLError, match=r"pip install 'traceml-torch\[submit\]'"):
        Launcher().submit(print)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--nodes", "2"], "--nodes needs --submit"),
        (["--wait"], "--wait needs --submit"),
        (["--sbatch", "exclusive"], "--sbatch needs --submit"),
        (["--submit", "--live", "web"], "--live web shows a job that runs here"),
        (["--submit", "--time", "soon"], "time='soon'"),
        (["--submit", "--sbatch", "=x"], "--sbatch =x: give an option of sbatch"),
    ],
)
def test_misuse_of_the_command_is_reported(
    words: list[str], complaint: str, capsys, monkeypatch, tmp_path: Path
) -> None:
    """In one line, with status 2."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.py").write_text("")

    assert cli.main(["launch", *words, "x.py"]) == 2
    assert complaint in capsys.readouterr().err
