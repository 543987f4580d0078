"""Code, environment and machine of a run that is only traced, read by its aggregator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest

from tests.aggregator.conftest import Serving, wait_for_acks
from tests.diagnosis.fabricated import Job, rows_of
from tests.eventually import eventually
from tests.runs.fabricated_store import add_info, add_rank, run_facts
from traceml.aggregator.collecting.source_readings import SourceRequest, find_request
from traceml.clock import process_start_ticks
from traceml.database.source_record import SOURCE, SourceReading
from traceml.database.store.store import StoreWriter
from traceml.run_folder import STORE_NAME
from traceml.runs.about import About, about_run
from traceml.transport.client import Connection

PASSWORD = "hunter2" + "correcthorse"
NAMES = ["git", "environment", "system"]

ASKED = {"names": ["git", "environment", "my:Collector"], "path": ["/x"], "mask": [], "after_s": 1.0}


@pytest.fixture
def serve(serving: Callable[..., Serving], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Serving]:
    """Start aggregators whose processes do not yield to the other tests."""
    monkeypatch.setenv("TRACEML_DELIVERY_NICE", "0")
    return serving


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one commit and a change."""
    folder = tmp_path / "repository"
    folder.mkdir()
    script = folder / "train.py"
    script.write_text("lr = 0.1\n")
    identity = ("-c", "user.name=T", "-c", "user.email=t@example.org")
    for arguments in (["init", "-q"], ["add", "train.py"], ["commit", "-q", "-m", "first"]):
        subprocess.run(["git", *identity, *arguments], cwd=folder, check=True)

    script.write_text(f"lr = 0.2\npassword = '{PASSWORD}'\n")
    return folder


@pytest.fixture
def slow_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `git` that does not end, before the real one on the PATH; return the file into which it writes its pid."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "git"
    script.write_text(
        f"#!/bin/sh\necho $$ > {tmp_path}/pid.new\nmv {tmp_path}/pid.new {tmp_path}/pid\nexec sleep 3600\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path / "pid"


def _process_row(folder: Path, **collect: Any) -> bytes:
    wanted = {"names": NAMES, "path": sys.path, "mask": [], "after_s": 0.0, **collect}
    row = {
        "kind": "process", "t_ns": 1, "python": "3.99.1", "executable": "/bin/false", "folder": str(folder),
        "argv": ["train.py", "--lr", "0.2"], "git": {"commit": "of the start"}, "collect": wanted,
    }  # fmt: skip
    return bytes(msgpack.packb(row))


def _begin(aggregator: Serving, row: bytes, logged: bytes = b"", **facts: Any) -> Connection:
    rank = aggregator.rank(**facts)
    for table, data in {"info": row, "logged": logged}.items():
        if data:
            rank.send_rows(table, 0, 1, data)
            wait_for_acks(rank, table, 1)

    return rank


def _reading(aggregator: Serving) -> SourceReading | None:
    with aggregator.store() as store:
        event = store.last_event(SOURCE)
        return None if event is None else SourceReading.from_event(event.data)


def _about(aggregator: Serving) -> About:
    with aggregator.store() as store:
        return about_run(store)


def test_a_traced_run_has_its_changes_packages_and_variables(serve: Callable[..., Serving], repository: Path) -> None:
    """They are those of the rank's process, masked; the interpreter that it names is not started."""
    aggregator = serve()
    other = _begin(aggregator, _process_row(repository.parent), rank=1, world_size=2)
    rank = _begin(aggregator, _process_row(repository), world_size=2)
    reading = eventually(lambda: _reading(aggregator))
    about = _about(aggregator)
    for each in (rank, other):
        each.close("finished")

    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True, check=True)
    assert reading.unread == about.not_read == ""
    assert about.unread == ()
    assert about.git["commit"] == head.stdout.strip()
    assert about.git["dirty"]
    assert "-lr = 0.1\n+lr = 0.2\n" in about.git["diff"]
    assert f"pytest=={pytest.__version__}" in about.environment["packages"].splitlines()
    assert about.environment["python"] == "3.99.1"
    assert about.system["cores"] == os.cpu_count()
    assert PASSWORD not in repr(about)


def test_a_run_that_ends_first_has_what_was_read(
    serve: Callable[..., Serving], repository: Path, slow_git: Path
) -> None:
    """It does not wait for a git that hangs, and no process is left."""
    aggregator = serve()
    rank = _begin(aggregator, _process_row(repository))
    git = int(eventually(lambda: slow_git.exists() and slow_git.read_text()))
    rank.close("finished")
    eventually(lambda: aggregator.state() == "finished")
    eventually(lambda: process_start_ticks(git) is None)

    about = _about(aggregator)
    assert about.not_read == "the run ended before they were read"
    assert about.unread[0] == "git"
    assert about.git == {"commit": "of the start"}


def test_an_aggregator_that_stops_ends_the_reading(
    serve: Callable[..., Serving], repository: Path, slow_git: Path
) -> None:
    """The next one reads, as the run goes on."""
    aggregator = serve()
    rank = _begin(aggregator, _process_row(repository))
    git = int(eventually(lambda: slow_git.exists() and slow_git.read_text()))
    assert aggregator.stop() == 0
    eventually(lambda: process_start_ticks(git) is None)

    slow_git.unlink()
    aggregator.start()
    rank.close("restarted")
    rank = aggregator.rank()
    eventually(slow_git.exists)
    rank.close("finished")
    eventually(lambda: aggregator.state() == "finished")  # else its git would outlive the test


def test_a_short_run_starts_no_process(serve: Callable[..., Serving], repository: Path, slow_git: Path) -> None:
    """It says that it was too short."""
    aggregator = serve()
    rank = _begin(aggregator, _process_row(repository, after_s=3600.0))
    rank.close("finished")
    eventually(lambda: aggregator.state() == "finished")

    assert _reading(aggregator) is None
    assert not slow_git.exists()
    assert _about(aggregator).not_read == "the run was shorter than 3600 s"


def test_what_the_rank_collects_is_not_read_again(serve: Callable[..., Serving], repository: Path) -> None:
    """An Experiment of the script has started the collectors in the rank."""
    aggregator = serve()
    row = {"kind": "collected", "t_ns": 1, "name": "git", "facts": {"commit": "of the rank"}}
    rank = _begin(aggregator, _process_row(repository), bytes(msgpack.packb(row)))
    reading = eventually(lambda: _reading(aggregator))
    about = _about(aggregator)
    rank.close("finished")

    assert set(reading.facts) == {"environment", "system"}
    assert about.git == {"commit": "of the rank"}
    assert about.environment["packages"]


def test_a_rank_of_another_host_is_not_read(serve: Callable[..., Serving], repository: Path, slow_git: Path) -> None:
    """It says so, and what lets the rank read there."""
    aggregator = serve()
    rank = _begin(aggregator, _process_row(repository), boot_id="that of another host")
    eventually(lambda: _reading(aggregator))
    about = _about(aggregator)
    rank.close("finished")

    assert about.unread == tuple(NAMES)
    assert "TRACEML_COLLECTORS=git,environment,system" in about.not_read
    assert not slow_git.exists()


def _found(folder: Path, *rows: dict[str, Any], reading: SourceReading | None = None) -> list[str]:
    with StoreWriter(folder / STORE_NAME) as writer:
        writer.put_meta("run", run_facts())
        stream = add_rank(writer, 0, rows_of(Job(steps=5))[0])
        for row in rows:
            if row["kind"] == "collected":
                writer.append(stream, "logged", writer.next_seq(stream, "logged"), 1, msgpack.packb(row))
            else:
                add_info(writer, stream, **row)

        if reading is not None:
            writer.event(SOURCE, reading.to_event())

    return sorted(find_request(folder / STORE_NAME, stream)[1])


def test_built_in_collectors_are_asked_for(tmp_path: Path) -> None:
    """No class that another process names is loaded."""
    assert _found(tmp_path, {"kind": "loader"}, {"kind": "process", "collect": ASKED}) == ["environment", "git"]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"kind": "exit", "code": 0}],
        [{"kind": "process", "folder": "."}],
        [{"kind": "process", "collect": {**ASKED, "names": []}}],
        [{"kind": "process", "collect": ASKED}, *({"kind": "collected", "name": each} for each in ASKED["names"])],
    ],
)
def test_nothing_is_read_where_nothing_is_asked(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    """Ranks that have not told, that read by themselves, or whose settings are against it."""
    assert _found(tmp_path, *rows) == []


@pytest.mark.parametrize(("unread", "names"), [("", []), ("ended", ["environment", "git"])])
def test_what_was_read_whole_is_not_read_again(tmp_path: Path, unread: str, names: list[str]) -> None:
    """An earlier aggregator of the run has read it."""
    assert _found(tmp_path, {"kind": "process", "collect": ASKED}, reading=SourceReading(1, {}, unread)) == names


@pytest.mark.parametrize("collect", [7, {**ASKED, "names": "git"}, {**ASKED, "path": [1]}, {"names": []}])
def test_a_row_of_other_types_is_refused(tmp_path: Path, collect: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        _found(tmp_path, {"kind": "process", "collect": collect})


def _line(names: list[str], pid: int) -> bytes:
    row = {"kind": "process", "collect": {**ASKED, "path": []}}
    return msgspec.convert(row, SourceRequest).line(names, pid)


def _environ_of(pid: int) -> Any:
    return json.loads(_line(["environment"], pid))["config"]["environ"]


def test_the_collectors_process_ends_with_its_standard_input() -> None:
    """The request has all that the process reads of it, also at its end."""
    code = "from traceml.track.rank.collectors.collector_main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], input=_line(["system"], os.getpid()), capture_output=True, check=False
    )

    assert (done.returncode, done.stderr) == (0, b"")


def test_variables_are_those_of_the_started_program() -> None:
    """Of a process that was only forked they are not known: the kernel tells those of the one that forked it."""
    code = "import os; pid = os.fork(); print(pid or '', flush=True, end=''); os.read(0, 1)"
    environ = {"OMP_NUM_THREADS": "3", "PATH": os.environ["PATH"]}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as program:
        assert program.stdout is not None
        forked = int(os.read(program.stdout.fileno(), 20))

        assert _environ_of(program.pid)["OMP_NUM_THREADS"] == "3"
        assert _environ_of(forked) is None
        program.communicate(b"xx")

    assert _environ_of(2**22 + 1) is None
