"""Our own processes import nothing from the working directory, where users have files such as `queue.py`."""

from __future__ import annotations

import ast
import gc
import http.client
import json
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.display.monitoring.collector import collecting
from tests.eventually import eventually
from tests.ports import free_port
from tests.recorder.conftest import environ
from tests.source_tree import SOURCE, nodes_of, source_files
from traceml.helper_programs import end_process, helper_program, importing
from traceml.supervise.page_process import PageProcess
from traceml.track.delivery.probe import probe

# Of the third-party modules, those that our processes import.
_LIBRARIES = (
    "fastapi",
    "httpx",
    "isal",
    "msgpack",
    "msgspec",
    "nicegui",
    "numpy",
    "pydantic",
    "rich",
    "tyro",
    "zstandard",
)
# What `python -m` imports with the folder on its path, before anything of a module.
_NEEDED = "import __future__, runpy, signal, sys; print(*sys.modules)"
# Reads its own values while it runs, so that it ends when each process beside it has done something.
_SCRIPT = """
    import os, sys, time, urllib.request
    import traceml

    rank, ports = os.environ.get("RANK", "0"), sys.argv[1:]
    if not ports:
        traceml.init(local=True, runs_dir="runs", quiet=False)

    with traceml.Experiment("poisoned", backend="jsonl", options={"jsonl": {"path": "logged"}}) as experiment:
        for step in range(3):
            with traceml.trace_step():
                experiment.log_metric("loss", 1.0)

    if rank == "0" and ports:
        print(urllib.request.urlopen(f"http://127.0.0.1:{ports[0]}/metrics", timeout=60).read().decode())
    if not ports:
        print("synced", traceml.sync())
"""


@pytest.fixture
def poisoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a file for each module of Python and of libraries, which tells that it was imported."""
    folder = tmp_path / "project"
    folder.mkdir()
    itself = subprocess.run([sys.executable, "-ISc", _NEEDED], stdout=subprocess.PIPE, text=True, check=True)
    for name in (sys.stdlib_module_names | {*_LIBRARIES}) - {*itself.stdout.split()}:
        (folder / f"{name}.py").write_text(
            f"open({str(tmp_path / 'imported')!r}, 'a').write(f'{{__name__}}\\n')\n1 / 0\n"
        )

    (tmp_path / "train.py").write_text(textwrap.dedent(_SCRIPT))
    monkeypatch.chdir(folder)
    return folder


def imported(folder: Path) -> list[str]:
    """The user's modules that a process has imported."""
    record = folder.parent / "imported"
    return record.read_text().split() if record.exists() else []


def delivered(folder: Path) -> bool:
    """Whether the tracker has the value."""
    return any('"loss"' in path.read_text() for path in (folder / "logged").rglob("*") if path.is_file())


def run(folder: Path, *words: str, **values: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the poisoned folder to its end."""
    variables = environ(folder.parent, **({"TRACEML_QUIET": "0", "TRACEML_DELIVERY_NICE": "0"} | values))
    return subprocess.run(words, cwd=folder, env=variables, capture_output=True, text=True, timeout=240, check=False)


def command(name: str = "traceml") -> str:
    """An installed command, whose own folder is first on its path."""
    return str(Path(sys.executable).with_name(name))


def test_each_is_started_by_the_same_helper():
    """Except the program that becomes the user's script: it takes the folder off its path itself."""
    started = {
        (path.relative_to(SOURCE).as_posix(), after.value)
        for path in source_files()
        for node in nodes_of(path, ast.List, ast.Tuple, ast.Call)
        for before, after in _neighbors(node)
        if before.value == "-m" and str(after.value).partition(".")[0] == "traceml"
    }

    assert {path for path, _ in started} <= {"cli/run.py"}
    assert helper_program("traceml.x", "a") == [sys.executable, "-P", "-m", "traceml.x", "a"]
    assert helper_program("traceml.x", unbuffered=True)[1:] == ["-uP", "-m", "traceml.x"]


def _neighbors(node: Any) -> list[tuple[ast.Constant, ast.Constant]]:
    values = node.args if isinstance(node, ast.Call) else node.elts
    pairs = pairwise(values)
    return [(a, b) for a, b in pairs if isinstance(a, ast.Constant) and isinstance(b, ast.Constant)]


@pytest.mark.process
def test_a_traced_script(poisoned):
    """Aggregator, metrics, OTLP, delivery, collectors, report and torchrun; the script is in another folder."""
    port = str(free_port())
    served = ("--live", "none", "--runs-dir", "runs", "--prometheus", port, "--nproc-per-node", "2")
    with collecting() as collector:
        done = run(
            poisoned,
            command(),
            "run",
            *served,
            "--nproc-per-node",
            "2",
            "../train.py",
            port,
            TRACEML_OTLP_ENDPOINT=collector.url,
        )
        eventually(lambda: collector.traces, "the spans")

    assert (imported(poisoned), done.returncode) == ([], 0), done.stderr
    assert "traceml_steps_total" in done.stdout
    assert delivered(poisoned)
    json.loads((poisoned / "runs" / "latest" / "report.json").read_text())


@pytest.mark.process
def test_a_script_that_starts_an_aggregator_of_its_own(poisoned):
    """Its aggregator, its verdict, and `traceml.sync`."""
    done = run(poisoned, sys.executable, "../train.py")

    assert (imported(poisoned), done.returncode) == ([], 0), done.stderr
    assert "synced True" in done.stdout
    assert "steps" in done.stderr  # the card
    assert delivered(poisoned)


@pytest.mark.process
def test_the_page(poisoned):
    with PageProcess(poisoned / "runs", 0, nice=0) as page:
        connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=60)
        connection.request("GET", "/")
        assert connection.getresponse().status == 401
        connection.close()

    assert imported(poisoned) == []


@pytest.mark.process
def test_the_probe_of_a_tracker(poisoned):
    """A tracker of the user's own is found in the folder."""
    (poisoned / "mine.py").write_text(
        "from traceml.track.backends.jsonl import *\nfrom traceml.track.backends import jsonl\n"
        "Mine = next(v for v in vars(jsonl).values() if isinstance(v, type) and v.__module__ == jsonl.__name__)\n"
    )
    assert probe("mine:Mine", {}, poisoned / "runs" / "r").error == ""
    assert imported(poisoned) == []


@pytest.mark.process
@pytest.mark.parametrize(
    "words",
    [
        [sys.executable, "-m", "traceml", "doctor"],
        helper_program("traceml", "top"),
        helper_program("traceml", "profile"),
    ],
    ids=["typed", "top", "profile"],
)
def test_the_command(poisoned, words):
    """As users type it, which puts the folder first on its path, and as `serve` and aggregators start it."""
    assert run(poisoned, *words).returncode in (0, 1, 2, 3)  # there is no run, nor a terminal
    assert imported(poisoned) == []


def test_what_a_program_has_imported_is_never_searched_for_garbage():
    before = gc.get_freeze_count()
    try:
        with importing():
            pass

        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()


def test_nothing_is_collected_while_a_program_imports():
    """The collector is on again afterwards, also after a failure; one that was off stays off."""
    with suppress(ImportError), importing():
        assert not gc.isenabled()
        raise ImportError

    assert gc.isenabled()
    gc.disable()
    try:
        with importing():
            pass

        assert not gc.isenabled()
    finally:
        gc.enable()


LEAVING = """
import atexit, sys, threading, time
from traceml.helper_programs import exit_process

class Kept:
    def __del__(self):
        print("a module was taken apart")

def work():
    time.sleep(0.2)
    print("thread")

kept = Kept()
atexit.register(print, "handler")
print("unflushed", end=" ")
threading.Thread(target=work).start()
exit_process(7)
"""


@pytest.mark.process
def test_a_program_ends_after_its_threads_and_exit_handlers_and_takes_no_module_apart():
    done = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout, done.stderr) == (7, "unflushed thread\nhandler\n", "")


@pytest.mark.process
def test_a_program_ends_with_its_status_also_when_nobody_reads_its_output():
    code = "import os; from traceml.helper_programs import exit_process; print('x'); os.close(1); exit_process(5)"

    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=False).returncode == 5


@pytest.mark.process
def test_a_command_that_wrote_to_a_closed_pipe_ends_as_by_sigpipe():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "traceml", "--version"], stdout=writer, check=False)
    os.close(writer)

    assert done.returncode == 141


@pytest.mark.process
@pytest.mark.parametrize("asked", [True, False])
def test_a_process_that_does_not_end_in_time_is_killed(asked):
    """One that ends in time keeps its own status."""
    sleeper = subprocess.Popen(
        [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"], stdout=subprocess.PIPE
    )
    with sleeper:
        sleeper.stdout.readline()
        if asked:
            sleeper.terminate()

        end_process(sleeper, 240.0 if asked else 0.01)

    assert sleeper.returncode == (-signal.SIGTERM if asked else -signal.SIGKILL)
