"""`traceml run`: what a user's script does passes through, and what became of it is told."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.conftest import TINY, Ended, Running, Traceml
from tests.forked import client as forked
from tests.processes import command_of
from traceml.database.source_record import SOURCE
from traceml.database.store.reader import StoreReader
from traceml.run_folder import STORE_NAME
from traceml.runs.run import load_run


def assert_nothing_is_left(ended: Ended) -> None:
    """No process that knows of this run's folder is alive, and no flight file of it is in memory."""
    leftovers = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        try:
            environ = process.environ()
        except (psutil.Error, OSError):
            continue

        if environ.get("TRACEML_RUN_ID") == ended.run_dir.name:
            leftovers.append(process.info)

    assert leftovers == []


def store_counts(report: dict) -> tuple[int, int, int]:
    telemetry = report["telemetry"]
    return telemetry["rows_appended"], telemetry["rows_stored"], telemetry["rows_lost"]


def test_one_process_is_traced_and_passed_through(traceml: Traceml) -> None:
    """Output, arguments and status are the script's own; the card goes to stderr, every step is stored."""
    ended = traceml("run", TINY, "--steps", "60")

    assert ended.status == 0, ended.stderr
    words = [sys.executable, TINY, "--steps", "60"]
    plain = forked.run(words, env=traceml.environ, capture_output=True, text=True, check=True)
    assert ended.stdout == plain.stdout  # the loss to the last bit
    first, _, card = ended.stderr.partition("\n")
    assert first.startswith(f"traceml: tracing this run; results in traceml_runs/{ended.run_dir.name}; live: ")
    assert str(ended.run_dir / "report.json") in card.replace("\n", "")
    report = ended.report
    assert report["schema"] == "traceml.report/1"
    assert report["run"]["state"] == "finished"
    assert report["steps"]["count"] == 60
    assert report["telemetry"]["rows_lost"] == 0
    assert (ended.run_dir.parent / ".gitignore").read_text() == "*\n"
    assert_nothing_is_left(ended)


def test_a_traced_run_has_its_packages_and_changes(traceml: Traceml) -> None:
    """They are read beside it when it is old enough; a run that ends before says so."""
    identity = ("-c", "user.name=T", "-c", "user.email=t@example.org")
    script, done = traceml.folder / "tiny.py", traceml.folder / "done"
    script.write_bytes(TINY.read_bytes())
    for words in (["init", "-q"], ["add", "tiny.py"], ["commit", "-q", "-m", "first"]):
        subprocess.run(["git", *identity, *words], cwd=traceml.folder, check=True)

    with script.open("a") as text:
        text.write("# changed\n")

    soon = {"TRACEML_COLLECT_AFTER": "0", "TRACEML_DELIVERY_NICE": "0"}
    going_on = traceml.start("run", script, "--steps", "100000", "--pause", "0.02", "--until", done, **soon)
    going_on.wait_for_ranks(1)

    def read() -> bool:
        with StoreReader(traceml.folder / "traceml_runs" / "latest" / STORE_NAME) as store:
            return store.last_event(SOURCE) is not None

    going_on.wait_for(read, "packages to be read")
    done.touch()
    report = going_on.end().report
    assert report["run"]["dirty"]
    assert "+# changed" in report["source"]["diff"]
    assert report["source"]["packages"]["pytest"] == pytest.__version__
    assert report["source"]["not_read"] == ""

    short = traceml("run", script, "--steps", "5", TRACEML_COLLECT_AFTER="3600").report
    assert short["run"]["commit"] == report["run"]["commit"]
    assert short["source"]["packages"] == {}
    assert short["source"]["not_read"] == "the run was shorter than 3600 s"


def test_a_quiet_run_prints_nothing(traceml: Traceml) -> None:
    """TRACEML_QUIET=1 is neither the line at the start nor the card; the report is written and copied."""
    ended = traceml("run", "--report", "copy.json", TINY, "--steps", "20", TRACEML_QUIET="1")

    assert (ended.status, ended.stderr) == (0, "")
    assert json.loads((traceml.folder / "copy.json").read_text()) == ended.report


@pytest.mark.parametrize("ranks", [2, 4])
def test_several_ranks_are_one_run(traceml: Traceml, ranks: int) -> None:
    """All ranks arrive in one report."""
    ended = traceml("run", "--nproc-per-node", str(ranks), TINY, "--steps", "60")

    assert ended.status == 0, ended.stderr
    report = ended.report
    assert report["run"]["world_size"] == ranks
    assert [rank["rank"] for rank in report["ranks"]] == list(range(ranks))
    assert {rank["steps"] for rank in report["ranks"]} == {60}
    assert {rank["state"] for rank in report["ranks"]} == {"finished"}
    assert_nothing_is_left(ended)


def test_a_job_whose_other_nodes_do_not_come_is_one_run(traceml: Traceml) -> None:
    """Its aggregator starts when the nodes have met."""
    alone = ("--standalone", "--rdzv-conf", "last_call_timeout=1")
    ended = traceml("run", *alone, "--nnodes", "1:2", TINY, "--steps", "20")

    assert ended.status == 0, ended.stderr
    assert ended.stderr.startswith("traceml: tracing this run; results in ")
    assert [rank["steps"] for rank in ended.report["ranks"]] == [20]


def test_one_rank_has_the_variables_of_torchrun(traceml: Traceml) -> None:
    """`--nproc-per-node 1` starts a script as torchrun does: it may form a process group. Its options are its own."""
    (traceml.folder / "alone.py").write_text(
        "import sys, torch.distributed as dist\n"
        'dist.init_process_group("gloo")\nprint(dist.get_world_size(), *sys.argv[1:])\n'
    )

    ended = traceml(
        "run", "--nproc-per-node", "1", "alone.py", "--log", "--", "--rdzv-id"
    )  # --log: as --log-dir begins

    assert (ended.status, ended.stdout) == (0, "1 --log -- --rdzv-id\n"), ended.stderr


def test_a_module_is_run(traceml: Traceml, tmp_path: Path) -> None:
    """`-m MODULE` finds a module as `python -m` does."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "train.py").write_text(TINY.read_text())

    ended = traceml("run", "-m", "package.train", "--steps", "20")

    assert ended.status == 0, ended.stderr
    assert ended.report["run"]["name"] == "train"
    assert re.fullmatch(r"\d{8}-\d{6}-train-[0-9a-f]{4}", ended.report["run"]["id"])
    assert ended.report["steps"]["count"] == 20


@pytest.mark.parametrize(
    ("end", "status", "expected"),
    [
        ("raise", 1, {"exception": "ValueError"}),
        ("raise_to_own_hook", 1, {"exception": "ValueError"}),
        ("exit", 3, {"code": 3}),
        ("_exit", 4, {"code": 4}),
        ("kill", 137, {"signal": 9}),
        ("term", 143, {"signal": 15}),
        ("interrupt", 130, {}),
    ],
)
def test_a_script_that_ends_badly(traceml: Traceml, end: str, status: int, expected: dict) -> None:
    """The status is python's own; rank, cause, last step and open phase are in the report."""
    ended = traceml("run", TINY, "--steps", "60", "--at", "30", "--end", end)

    assert ended.status == status, ended.stderr
    report = ended.report
    assert report["run"]["state"] == ("stopped" if end == "interrupt" else "failed")
    exit_facts = report["ranks"][0]["exit"]
    assert exit_facts["last_step"] == 29
    for key, value in expected.items():
        assert value == exit_facts[key] or (key == "exception" and value in exit_facts[key])

    if end != "interrupt":
        assert report["verdict"]["kind"] == "RANK_LOST"
        assert report["verdict"]["ranks"] == [0]
    if end.startswith("raise"):
        assert "ValueError: the batch is bad" in ended.stderr
        assert "traceml/recorder" not in ended.stderr
        assert report["verdict"]["evidence"]["file"].endswith("tiny.py")
    assert_nothing_is_left(ended)


@pytest.mark.parametrize(
    ("end", "status", "signal_number"), [("kill", 137, 9), ("raise", 1, None), ("_exit", 4, None), ("term", 143, 15)]
)
def test_a_rank_of_two_is_lost(traceml: Traceml, end: str, status: int, signal_number: int | None) -> None:
    """The verdict names the rank that went first, not those that torchrun ended after it."""
    ended = traceml("run", "--nproc-per-node", "2", TINY, "--steps", "60", "--at", "30", "--rank", "1", "--end", end)

    # torchrun's, of rank 0 if both have ended before it looks: that one raises, as its peer is gone
    assert ended.status in (status, 1), ended.stderr
    verdict = ended.report["verdict"]
    assert verdict["kind"] == "RANK_LOST"
    assert verdict["ranks"] == [1]
    assert ended.report["ranks"][1]["exit"]["signal"] == signal_number
    assert ended.report["ranks"][1]["exit"]["last_step"] == 29
    assert_nothing_is_left(ended)


def test_a_restart_by_torchrun_is_a_second_attempt(traceml: Traceml) -> None:
    """One run, two attempts; the second is what the report describes."""
    # one rank: with more, gloo's rendezvous of a next attempt fails now and then, under torchrun alone too
    torchrun = ("--nproc-per-node", "1", "--max-restarts", "1")
    script = (TINY, "--steps", "50", "--at", "20", "--end", "kill", "--first-attempt-only")
    ended = traceml("run", *torchrun, *script)

    assert ended.status == 0, ended.stderr
    assert len(list((ended.folder / "traceml_runs").glob("2*"))) == 1
    report = ended.report
    assert report["run"]["attempt"] == 1
    assert report["run"]["state"] == "finished"
    assert report["steps"]["count"] == 50
    [restart] = report["run"]["restarts"]
    assert (restart["ranks"], restart["reason"], restart["step"]) == ([0], "SIGKILL", 20)
    assert restart["lost_s"] > 0
    assert "Restarted once: rank 0, SIGKILL at step 20 (lost " in ended.stderr
    assert "Restarted once: rank 0, SIGKILL at step 20 (lost " in (ended.run_dir / "report.html").read_text()


def test_a_script_raises_before_its_first_step(traceml: Traceml, tmp_path: Path) -> None:
    """There is nothing to diagnose but the exception itself: its traceback, and one line."""
    script = tmp_path / "broken.py"
    script.write_text("import json\n\njson.loads('no')\n")

    ended = traceml("run", script)

    assert ended.status == 1
    _, _, printed = ended.stderr.partition("\n")
    traceback, _, ours = printed.partition("traceml: ")
    assert traceback.startswith("Traceback")
    assert traceback.rstrip().splitlines()[-1].startswith("json.decoder.JSONDecodeError")
    assert ours.startswith("Rank 0 ended with json.decoder.JSONDecodeError")
    assert ours.endswith(f"before the first step. More: traceml report {ended.run_dir.name}\n")
    assert ours.count("\n") == 1
    assert ended.report["verdict"]["kind"] == "RANK_LOST"
    assert ended.report["verdict"]["evidence"]["line"] == 3


def test_ctrl_c_before_the_first_step_is_a_stop(traceml: Traceml, tmp_path: Path) -> None:
    """It is told in one line, and is no failure to look into."""
    script = tmp_path / "starts.py"
    script.write_text(
        "import pathlib, os, time\npathlib.Path('marker.0').write_text(str(os.getpid()))\n"
        "while True:\n    time.sleep(0.05)\n"  # a signal that comes just before a longer wait would not end it
    )
    running = traceml.start("run", script)
    running.pid_of(0)
    running.process.send_signal(signal.SIGINT)

    ended = running.end()

    assert ended.status == 130
    line = f"traceml: Stopped before the first step. More: traceml report {ended.run_dir.name}"
    assert ended.stderr.splitlines()[-3:] == ["KeyboardInterrupt", "", line]
    assert ended.report["run"]["state"] == "stopped"
    assert "stopped" in ended.report["verdict"]["summary"]
    shown = traceml("report")
    assert "1 rank, stopped after" in shown.stdout
    assert "failed" not in shown.stdout


def test_ranks_per_gpu_without_one_are_one_line(traceml: Traceml) -> None:
    """torchrun's own check fails before any rank is started."""
    ended = traceml("run", "--nproc-per-node", "xpu", TINY, CUDA_VISIBLE_DEVICES="")

    assert ended.status == 2
    assert "Traceback" not in ended.stderr
    assert "torchrun: --nproc-per-node xpu: Xpu is not available." in ended.stderr.splitlines()
    assert "traceml: The job failed before its first step: read its output, if it has any." in ended.stderr


def test_a_script_without_training(traceml: Traceml, tmp_path: Path) -> None:
    """No step is no verdict."""
    script = tmp_path / "hello.py"
    script.write_text("print('hello')\n")

    ended = traceml("run", script)

    assert (ended.status, ended.stdout) == (0, "hello\n")
    assert ended.report["verdict"]["kind"] == "INSUFFICIENT_DATA"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("run", "missing.py"), "missing.py"),
        (("run",), "no script given"),
        (("run", "--bogus", "x.py"), "--bogus"),
        (("run", "--live", "terminal", str(TINY)), "terminal"),
    ],
)
def test_a_wrong_call_is_one_line_and_status_2(traceml: Traceml, words: tuple[str, ...], hint: str) -> None:
    """Nothing is started, nothing is written."""
    ended = traceml(*words)

    assert ended.status == 2
    assert hint in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (ended.folder / "traceml_runs").exists()


def test_an_unwritable_runs_folder_stops_before_training(traceml: Traceml, tmp_path: Path) -> None:
    """The error names the folder and the way out, and the script has not begun."""
    (tmp_path / "file").write_text("")

    ended = traceml("run", "--runs-dir", tmp_path / "file" / "runs", TINY)

    assert ended.status == 3
    assert "--runs-dir" in ended.stderr
    assert ended.stdout == ""


def test_names_of_files_that_are_not_utf8(tmp_path: Path) -> None:
    """A folder, a script and an artifact whose names are other bytes: all rows are stored, and the verdict is shown."""
    folder = tmp_path / os.fsdecode(b"d\xe9p")
    folder.mkdir()
    script, artifact = folder / os.fsdecode(b"train\xe9.py"), folder / os.fsdecode(b"loss\xe9.txt")
    artifact.write_text("0.1")
    name = f"{os.fsencode(artifact)!r}.decode(errors='surrogateescape')"
    log = f"import traceml\ntraceml.init(local=True)\ntraceml.log_artifact({name})\n"
    script.write_text(log + TINY.read_text().replace("from __future__ import annotations\n", ""))

    with closing(Traceml(folder)) as traceml:
        run = traceml("run", script, "--steps", "30")
        local = forked.run([sys.executable, script], cwd=folder, env=traceml.environ, capture_output=True, text=True)

    assert run.status == local.returncode == 0
    for stderr in (run.stderr, local.stderr):
        assert "Traceback" not in stderr
        assert "Report" in stderr

    reports = list((folder / "traceml_runs").glob("2*/report.json"))
    assert len(reports) == 2
    for path in reports:
        appended, stored, lost = store_counts(json.loads(path.read_text()))
        assert (appended, lost) == (stored, 0)
        assert len(list((path.parent / "artifacts").iterdir())) == 1


def test_disabled_is_python_alone(traceml: Traceml, tmp_path: Path) -> None:
    """TRACEML_ENABLED=0 runs the script and leaves no trace: no module of ours is in its process."""
    script = tmp_path / "alone.py"
    script.write_text("import sys\nprint(sys.argv[1:], [each for each in sys.modules if each.startswith('traceml')])\n")

    ended = traceml("run", script, "--steps", "3", TRACEML_ENABLED="0")

    assert (ended.status, ended.stdout) == (0, "['--steps', '3'] []\n")
    assert ended.stderr == ""
    assert not (ended.folder / "traceml_runs").exists()


def test_two_runs_at_once_do_not_meet(traceml: Traceml) -> None:
    """Each has its own aggregator, folder and report."""
    first = traceml.start("run", TINY, "--steps", "40", "--pause", "0.01")
    second = traceml.start("run", TINY, "--steps", "50", "--pause", "0.01")

    assert [first.end().status, second.end().status] == [0, 0]
    reports = [json.loads(path.read_text()) for path in (traceml.folder / "traceml_runs").glob("2*/report.json")]
    assert {report["steps"]["count"] for report in reports} == {40, 50}


def _aggregators_of(running: Running) -> list[psutil.Process]:
    children = psutil.Process(running.process.pid).children()
    return [child for child in children if "serve" in command_of(child)]


def test_the_aggregator_dies_and_nothing_is_lost(traceml: Traceml) -> None:
    """A new aggregator takes over the port; every step of both lives is stored once."""
    done = traceml.folder / "done"
    running = traceml.start("run", TINY, "--steps", "100000", "--pause", "0.01", "--marker", "marker", "--until", done)
    running.pid_of(0)
    [first] = running.wait_for(lambda: _aggregators_of(running), "the aggregator")
    first.kill()
    running.wait_for(lambda: [each for each in _aggregators_of(running) if each != first], "another aggregator")
    done.touch()

    ended = running.end()

    assert ended.status == 0, ended.stderr
    appended, stored, lost = store_counts(ended.report)
    steps = load_run(ended.run_dir).steps()["step"].tolist()
    assert steps == [*range(ended.report["steps"]["count"])]
    assert (lost, appended) == (0, stored)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_to_the_command_reaches_the_job(
    traceml: Traceml, ranks: int, number: signal.Signals, status: int
) -> None:
    """The job ends by the signal, the run is finished, the status says so, and how each rank ended is known."""
    many = ("--nproc-per-node", str(ranks)) if ranks > 1 else ()
    # Apart: torchrun signals one rank after the other, and a rank whose peer is gone raises.
    running = traceml.start("run", *many, TINY, "--apart", "--steps", "3000", "--pause", "0.02", "--marker", "marker")
    for rank in range(ranks):
        running.pid_of(rank)

    running.process.send_signal(number)
    ended = running.end()

    assert ended.status == status, ended.stderr
    assert ended.report["run"]["state"] == "stopped"
    verdict = ended.report["verdict"]
    assert ended.report["steps"]["count"] > 0
    assert (verdict["kind"] == "RANK_LOST") is (number == signal.SIGTERM)
    if number == signal.SIGTERM:
        assert (verdict["ranks"], verdict["evidence"]["cause"]) == ([], "ended_from_outside")
        assert f"(process {os.getpid()}) ended the job" in verdict["summary"]
        assert [rank["exit"]["signal"] for rank in ended.report["ranks"]] == [number] * ranks
    assert_nothing_is_left(ended)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_command_leaves_no_process(traceml: Traceml, ranks: int) -> None:
    """SIGKILL of the command ends the job; the aggregator still writes the report."""
    many = ("--nproc-per-node", str(ranks)) if ranks > 1 else ()
    running = traceml.start("run", *many, TINY, "--steps", "3000", "--pause", "0.02", "--marker", "marker")
    pids = [running.pid_of(rank) for rank in range(ranks)]
    running.wait_for_ranks(ranks)

    running.process.kill()

    running.wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids), "the script to end")
    ended = running.end()
    running.wait_for(lambda: (ended.run_dir / "report.json").exists(), "the report")
    assert ended.report["steps"]["count"] > 0
    assert ended.report["run"]["state"] in {"failed", "lost"}
    assert ended.report["verdict"]["evidence"]["launcher_pid"] == running.process.pid
    assert "BrokenPipeError" not in ended.stderr


def test_a_killed_torchrun_is_the_cause_of_the_end(traceml: Traceml) -> None:
    """Its ranks end with it, without a word."""
    running = traceml.start(
        "run", "--nproc-per-node", "2", TINY, "--steps", "3000", "--pause", "0.02", "--marker", "marker"
    )
    running.wait_for_ranks(2)
    torchrun = psutil.Process(running.pid_of(0)).ppid()

    os.kill(torchrun, signal.SIGKILL)

    evidence = running.end().report["verdict"]["evidence"]
    assert (evidence["cause"], evidence["launcher_pid"]) == ("ended_from_outside", torchrun)


def test_a_rank_killed_from_outside_loses_no_row(traceml: Traceml) -> None:
    """What the rank had appended before SIGKILL is in the store, with the step that was open."""
    running = traceml.start("run", TINY, "--steps", "3000", "--pause", "0.005", "--marker", "marker")
    os.kill(running.pid_of(0), signal.SIGKILL)

    ended = running.end()

    assert ended.status == 137
    [rank] = ended.report["ranks"]
    assert rank["state"] == "killed"
    assert rank["exit"]["signal"] == 9
    log = (ended.run_dir / "logs" / "aggregator.log").read_text()
    assert rank["exit"]["last_step"] == rank["steps"] - 1, (rank, log)
    assert ended.report["telemetry"]["rows_lost"] == 0


SPAWNED = """
import os, sys
import torch, torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset

def work(rank, world, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for x, in DataLoader(TensorDataset(torch.ones(120, 8)), 2, num_workers=1):
        model(x).sum().backward()
        optimizer.step()
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.start_processes(work, args=(2, sys.argv[2]), nprocs=2, start_method=sys.argv[1])
"""


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_ranks_that_the_script_spawns(traceml: Traceml, tmp_path: Path, method: str) -> None:
    """Children that train are the ranks of the run; the script's own process and loader workers are none."""
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    ended = traceml("run", str(script), method, str(tmp_path / "store"))

    assert ended.status == 0, ended.stderr
    assert [(rank["rank"], rank["steps"]) for rank in ended.report["ranks"]] == [(0, 60), (1, 60)]
    assert ended.report["run"]["world_size"] == 2
    assert ended.report["telemetry"]["rows_lost"] == 0
    assert_nothing_is_left(ended)


def test_of_spawned_ranks_the_one_that_was_killed_first_is_named(traceml: Traceml, tmp_path: Path) -> None:
    """The script ends the others because of it."""
    script = tmp_path / "spawned.py"
    killed = "    import time\n    os.kill(os.getpid(), 9) if rank == 1 else time.sleep(60)\n"
    script.write_text(SPAWNED.replace("    dist.destroy_process_group()\n", killed))
    ended = traceml("run", str(script), "spawn", str(tmp_path / "store"))

    verdict = ended.report["verdict"]
    assert (verdict["kind"], verdict["ranks"], verdict["evidence"]["signal"]) == ("RANK_LOST", [1], 9)
    assert "rank 0 ended because of that" in verdict["summary"]


POOL = """
import multiprocessing, multiprocessing.pool, os, sys, time
import torch
from torch.utils.data import DataLoader

def train(steps, begun="first"):
    torch.set_num_threads(1)
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for x in DataLoader(torch.ones(4 * steps, 8), batch_size=4):
        model(x).sum().backward()
        optimizer.step()
        open(begun, "w").close()
        time.sleep(0.005)

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    tasks, results = context.SimpleQueue(), context.SimpleQueue()
    worker = context.Process(target=multiprocessing.pool.worker, args=(tasks, results))
    worker.start()
    tasks.put((0, 0, train, (100,), {}))
    results.get()
    if sys.argv[2] == "in a task":
        tasks.put((0, 0, train, (100_000, "second"), {}))
        while not os.path.exists("second"):
            time.sleep(0.01)
    time.sleep(1)
    worker.terminate()
    worker.join()
    time.sleep(2)
"""


@pytest.mark.parametrize(("method", "when", "state"), [
    ("fork", "between tasks", "finished"), ("spawn", "between tasks", "finished"), ("fork", "in a task", "lost"),
])  # fmt: skip
def test_a_worker_of_a_pool_that_waits_for_a_task_may_be_ended(
    traceml: Traceml, tmp_path: Path, method: str, when: str, state: str
) -> None:
    """A pool does so at the end of `with Pool(...)`: such a worker has lost nothing."""
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    ended = traceml("run", str(script), method, when)

    assert ended.status == 0, ended.stderr
    assert [rank["state"] for rank in ended.report["ranks"]] == [state]
    assert (ended.report["verdict"]["kind"] == "RANK_LOST") == (state == "lost")


LEAVES = """
import os, sys, torch
from torch.utils.data import DataLoader
model = torch.nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
workers = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "fork"}
loader = DataLoader(torch.randn(400, 8), batch_size=8, **(workers if "keeps" in sys.argv[2] else {}))
for step, x in enumerate(loader):
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()
    if step == int(sys.argv[1]):
        if "leaves" in sys.argv[2]:
            break
        os._exit(0)
os._exit(0)
"""


@pytest.mark.parametrize(
    ("at", "how", "state"),
    [
        ("30", "exits", "lost"),
        ("30", "keeps", "lost"),
        ("30", "leaves", "finished"),
        ("30", "leaves, keeps", "finished"),
        ("999", "-", "finished"),
    ],
)
def test_a_process_that_leaves_in_the_middle_has_not_finished(traceml: Traceml, at: str, how: str, state: str) -> None:
    """`os._exit(0)` inside the loop; after it, also after a loop that was left, the training has ended.

    A loader keeps the iterator of a loop that was left, where its workers are persistent.
    """
    script = traceml.folder / "leaves.py"
    script.write_text(LEAVES)

    ended = traceml("run", script, at, how)

    assert ended.status == 0
    assert ended.report["run"]["state"] == state
    lost = [finding["summary"] for finding in ended.report["findings"] if finding["kind"] == "RANK_LOST"]
    assert len(lost) == (state == "lost")
    middle = "Rank 0 ended with exit code 0 in the middle of its script, in step 30, in code outside the known phases"
    assert all(summary.startswith(middle) for summary in lost)  # a sampled line may follow


GIVES_UP = """
import datetime, os, time, torch
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
impatient = torch.distributed.new_group(timeout=datetime.timedelta(seconds=6))
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(40):
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
if rank:
    time.sleep(12)
try:
    torch.distributed.barrier(impatient)
except RuntimeError:
    pass
os._exit(0)
"""


def test_a_job_whose_ranks_all_end_well_has_not_hung(traceml: Traceml) -> None:
    """Rank 0 gives up a barrier and leaves by os._exit(0), while rank 1 is busy elsewhere."""
    script = traceml.folder / "gives_up.py"
    script.write_text(GIVES_UP)

    ended = traceml("run", "--nproc-per-node", "2", script, TRACEML_HANG_TIMEOUT="5")

    assert (ended.status, ended.report["run"]["state"]) == (0, "finished")
    assert not {"HANG", "RANK_LOST"} & {finding["kind"] for finding in ended.report["findings"]}
