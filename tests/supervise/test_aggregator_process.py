"""The handle of a run's aggregator, next to one that answers late or not at all."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from traceml.errors import AggregatorUnavailableError, TraceMLError
from traceml.run_folder import AGGREGATOR_LOG
from traceml.settings import load
from traceml.supervise.aggregator_process import AggregatorProcess, choose_run_id
from traceml.transport.client import Connection, connect
from traceml.transport.hello import Hello

COMPUTES, WAITS = "while True: sum(range(10**5))", "input()"


def test_a_job_of_a_traced_script_has_an_id_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It inherits that of the script's run, whose store another aggregator writes; one that it sets itself counts."""
    monkeypatch.setenv("TRACEML_RUNS_DIR", str(tmp_path))
    monkeypatch.setenv("TRACEML_RUN_ID", "outer")
    (tmp_path / "outer").mkdir()

    assert choose_run_id(load(), "inner") == "outer"  # a job that is started again under its id

    monkeypatch.setenv("TRACEML_ADDRESS", "127.0.0.1:9")
    assert "-inner-" in choose_run_id(load(), "inner")

    monkeypatch.setenv("TRACEML_RUN_ID", "own")
    assert choose_run_id(load(), "inner") == "own"


def test_a_folder_whose_store_sqlite_could_not_open_is_refused(tmp_path: Path) -> None:
    """Before the job starts: it would run to its end, and nothing of it would be stored."""
    parent = tmp_path / ("y" * 200)
    runs_dir = parent / ("x" * (504 - len(f"{parent}//a-run/store.db")))
    runs_dir.mkdir(parents=True)
    with closing(sqlite3.connect(runs_dir / "a-run-store.db")) as store:  # as long as a-run/store.db
        store.execute("CREATE TABLE rows (id)")

    AggregatorProcess("a-run", runs_dir).check()

    with pytest.raises(TraceMLError, match=r"SQLite takes no path of more than 504 bytes.*--runs-dir"):
        AggregatorProcess("a-run2", runs_dir).check()

    with pytest.raises(TraceMLError, match=r"SQLite"):
        AggregatorProcess("a-run2", runs_dir).spawn_process()


class LateAggregator(AggregatorProcess):
    """An aggregator that does not answer twice."""

    def __init__(self, runs_dir: Path, program: str) -> None:
        super().__init__("a-run", runs_dir)
        self._program = program
        self.tries = 0

    def spawn_process(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", self._program], stdin=subprocess.PIPE)

    def _connect(self, timeout_s: float, **_: object) -> object:
        self.tries += 1
        before_s = self._cpu_s()
        while self._program is COMPUTES and self._cpu_s() == before_s:  # a tick of the kernel
            pass

        if self.tries <= 2:
            raise AggregatorUnavailableError("127.0.0.1", self.port, timeout_s, "it does not answer")

        return "connection"


@pytest.fixture
def late(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[LateAggregator]:
    with LateAggregator(tmp_path, request.param) as aggregator:
        aggregator.start()
        if aggregator._program is WAITS:
            _until_it_waits(aggregator)

        yield aggregator
        aggregator.process.kill()
        aggregator.process.stdin.close()


def _until_it_waits(aggregator: LateAggregator) -> None:
    path = Path(f"/proc/{aggregator.process.pid}/wchan")
    while "pipe" not in path.read_text():
        pass


@pytest.mark.parametrize("late", [COMPUTES], indirect=True)
def test_an_aggregator_that_starts_is_waited_for(late: LateAggregator) -> None:
    """On a busy host its imports take longer than an answer: it was killed half started, and the report was missing."""
    assert late._connect_at_end() == "connection"
    assert late.tries == 3


@pytest.mark.parametrize("late", [WAITS], indirect=True)
def test_an_aggregator_that_hangs_is_given_up(late: LateAggregator) -> None:
    """It uses no core meanwhile; another one takes its place."""
    with pytest.raises(AggregatorUnavailableError):
        late._connect_at_end()

    assert late.tries == 1


class Completing:
    """Connection to an aggregator whose report is late; it answers others meanwhile, or not."""

    def __init__(self, *, answers: bool) -> None:
        self.answers = answers
        self.commands: list[str] = []
        self.waits = 0

    def send_command(self, name: str, _args: object = None) -> int:
        self.commands.append(name)
        return 7

    def await_reply(self, number: int, name: str, *, timeout_s: float) -> dict[str, object]:
        assert (number, name) == (7, "finish")
        self.waits += 1
        if self.waits < 4:
            raise TimeoutError(f"no reply within {timeout_s}")

        return {}

    def request(self, name: str, _args: object = None, *, timeout_s: float) -> dict[str, object]:
        self.commands.append(name)
        if name == "status" and not self.answers:
            raise TimeoutError(f"no reply within {timeout_s}")

        return {"busy": False}

    def close(self) -> None:
        pass


class SlowReport(AggregatorProcess):
    """An aggregator without a process of its own: it uses no core."""

    def __init__(self, runs_dir: Path, *, answers: bool) -> None:
        super().__init__("a-run", runs_dir)
        self.connection = Completing(answers=answers)
        self.replaced = 0

    def start(self) -> None:
        pass

    def _connect(self, timeout_s: float, **_: object) -> object:
        return self.connection

    def _replace(self) -> None:
        self.replaced += 1
        self.connection = Completing(answers=True)


def test_a_report_that_takes_long_is_waited_for(tmp_path: Path) -> None:
    """Its aggregator was killed, and the run called incomplete, although it waited for the report alone."""
    serving = SlowReport(tmp_path, answers=True)

    assert serving.finish([], 0)
    assert serving.replaced == 0
    assert serving.connection.commands == ["exits", "finish", "status", "status", "status", "deliveries", "stop"]


def test_an_aggregator_that_hangs_at_the_end_is_replaced(tmp_path: Path) -> None:
    """It neither computes nor answers; the next one completes the run."""
    serving = SlowReport(tmp_path, answers=False)
    first = serving.connection

    assert serving.finish([], 0)
    assert serving.replaced == 1
    assert (first.commands, first.waits) == (["exits", "finish", "status"], 1)


class Refusing(AggregatorProcess):
    """An aggregator that could not make the store, as on a full disk: it has no run of this id."""

    def _connect(self, timeout_s: float, **options: object) -> Connection:
        hello = Hello(role="client", run="another-run")
        return connect("127.0.0.1", self.port, hello, self.token, timeout_s=timeout_s)


def test_a_refused_end_names_no_command_of_ours(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It says what that means for the run."""
    serving = Refusing("a-run", tmp_path)
    serving.start()
    try:
        assert not serving.finish([], 0)
    finally:
        serving.close()

    assert caplog.messages == ["the run is not complete: the aggregator answers: there is no run 'another-run' here"]


class Ending(AggregatorProcess):
    """An aggregator that ends at once with a status, and may say why in its log."""

    def __init__(self, runs_dir: Path, program: str) -> None:
        super().__init__("a-run", runs_dir)
        self._program = program

    def spawn_process(self) -> subprocess.Popen[bytes]:
        log = self.run_dir / AGGREGATOR_LOG
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stderr:
            return subprocess.Popen([sys.executable, "-c", self._program], stderr=stderr)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import sys; sys.exit('traceml serve: the disk is full.')", "(traceml serve: the disk is full)"),
        ("import sys; sys.exit(3)", "(ended with exit code 3)"),
        ("import os; os.kill(os.getpid(), 9)", None),
        ("", None),
    ],
)
def test_an_aggregator_that_ends_with_an_error_is_reported_once(
    program: str, words: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job would train for days without a word, and nothing of it would be stored; a killed one is replaced."""
    serving = Ending(tmp_path, program)
    with serving:
        for _ in range(3):
            serving.start()
            serving.process.wait()

    told = capsys.readouterr().err
    assert told.count("the aggregator has ended") == (words is not None)
    assert (words or "") in told
