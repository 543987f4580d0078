"""The words of a rank at its end about rows that are not stored, and what becomes of these rows."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

import traceml
from tests.aggregator.conftest import TOKEN, Serving
from tests.eventually import eventually
from tests.forked import client as forked
from tests.ports import free_port
from tests.recorder.conftest import Run, environ, stored_steps
from tests.recorder.test_recorder import do_steps, my_flights
from traceml.runs.report.report import build_report

pytestmark = pytest.mark.usefixtures("quiet_process")


def lose_aggregator(serving: Serving) -> None:
    serving.kill()
    serving.sock.close()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "traceml"]


def test_steps_whose_aggregator_never_came_back_are_reported_and_stored_later(
    serving: Serving, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """One line says how many, where, until when and what to do; the report counts them; `traceml sync` stores them."""
    recorder = traceml.init(port=serving.port, token=TOKEN, runs_dir=serving.folder, flush_interval=0.05)
    do_steps(30)
    assert recorder.wait_until_stored(120)  # and known here: the aggregator tells it after the commit
    assert stored_steps(serving) == list(range(30))
    lose_aggregator(serving)
    eventually(lambda: not recorder.statistics().connected)
    do_steps(70)
    with caplog.at_level(logging.WARNING, "traceml"):
        traceml.shutdown()

    [path] = my_flights()
    [line] = [text for text in warnings_of(caplog) if "not stored" in text]
    assert line.startswith("70 steps of this rank are not stored yet (")
    assert f"They are kept in {path} at least until " in line
    assert line.endswith("`traceml sync`, or `traceml serve` in this folder, stores them.")
    run_dir = (serving.folder / "latest").resolve()
    assert (build_report(run_dir).run.state, build_report(run_dir).run.steps_waiting) == ("lost", 70)

    words = [sys.executable, "-m", "traceml", "sync", "--runs-dir", str(serving.folder)]
    done = forked.run(words, imports="aggregator", capture_output=True, text=True, check=True, env=environ(tmp_path))

    assert f"{run_dir.name}: stored what its ranks left in memory" in done.stderr
    assert stored_steps(serving) == list(range(100))
    assert build_report(run_dir).run.steps_waiting == 0
    assert my_flights() == []


def test_steps_that_the_ring_overwrote_are_reported_with_numbers(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing says that all rows are kept, and at the end the loss is told, also if an aggregator came back."""
    recorder = traceml.init(port=serving.port, token=TOKEN, ring_rows=1024)
    eventually(lambda: recorder.statistics().connected)
    serving.kill()
    with caplog.at_level(logging.WARNING, "traceml"):
        do_steps(5_000)
        eventually(lambda: not recorder.statistics().connected)
        serving.start()
        traceml.shutdown()

    texts = warnings_of(caplog)
    with serving.store() as store:
        lost = store.lost("steps")
    assert lost > 3_000
    assert [text for text in texts if "lost the aggregator" in text and "the last 1,024 steps" in text]
    assert not [text for text in texts if "rows are kept" in text]
    assert texts[-1].startswith(f"{lost:,} of 5,000 steps are lost: they were overwritten before")
    assert "A rank keeps 1,024 steps; TRACEML_RING_ROWS sets the number." in texts[-1]


def test_overwritten_steps_are_counted_without_an_aggregator_too(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    """Lost and waiting steps add up to those that were not stored."""
    recorder = traceml.init(port=serving.port, token=TOKEN, ring_rows=128)
    eventually(lambda: recorder.statistics().connected)
    lose_aggregator(serving)
    with caplog.at_level(logging.WARNING, "traceml"):
        do_steps(500)
        eventually(lambda: not recorder.statistics().connected)
        traceml.shutdown()

    lost, waiting = warnings_of(caplog)[-2:]
    assert lost.startswith("373 of 500 steps are lost")
    assert waiting.startswith("127 steps of this rank are not stored yet")
    for path in my_flights():
        path.unlink()


def test_steps_that_no_aggregator_ever_took_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is left for a later one: the warning at the start may be thousands of lines above."""
    traceml.init(port=free_port(), token=TOKEN, on_missing="warn", connect_timeout=0.2)
    do_steps(5)
    with caplog.at_level(logging.WARNING, "traceml"):
        traceml.shutdown()

    last = warnings_of(caplog)[-1]
    assert last.startswith("5 steps of this rank are lost, as no aggregator answered (")
    assert last.endswith("Start one first with `traceml serve`, or call traceml.init(local=True).")
    assert my_flights() == []


def test_a_refusal_is_told_at_the_start_and_at_the_end(serving: Serving, caplog: pytest.LogCaptureFixture) -> None:
    """Once each, though the connection is tried more often; nobody is told to start what answers."""
    with caplog.at_level(logging.WARNING, "traceml"):
        recorder = traceml.init(port=serving.port, token="wrong", on_missing="warn")
        do_steps(5)
        recording = recorder.live_recording
        assert recording is not None
        eventually(lambda: recording.sender.trouble)
        traceml.shutdown()

    first, last = [text for text in warnings_of(caplog) if "refused the connection" in text]
    assert first.endswith("Training continues; the connection is retried in the background.")
    assert last.startswith("5 steps of this rank are lost, as no aggregator accepted them (")
    assert last.endswith("in a file of settings).")


@pytest.mark.process
def test_who_starts_an_aggregator_is_not_told_to_start_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The one that was started here has said why it cannot serve, as in a folder that cannot be written."""
    (tmp_path / "file").write_text("")
    runs_dir = tmp_path / "file" / "runs"
    traceml.init(local=True, runs_dir=runs_dir, token=TOKEN, on_missing="warn", connect_timeout=0.2)
    do_steps(5)
    with caplog.at_level(logging.WARNING, "traceml"):
        traceml.shutdown()

    last = warnings_of(caplog)[-1]
    assert last.startswith("5 steps of this rank are lost, as no aggregator answered (")
    assert str(runs_dir) in last
    assert "traceml serve`" not in last


def test_rows_in_plain_memory_are_not_promised_to_be_kept(serving: Serving, run_script: Run) -> None:
    """`ulimit -f 0` leaves no place for a flight file: they end with the process."""
    lose_aggregator(serving)
    done = run_script(
        "import resource, signal, traceml\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "traceml.init(on_missing='warn')\n"
        "traceml.log_metric('loss', 1)\n"
    )

    assert done.returncode == 0
    assert "logged rows of this rank may be lost: " in done.stderr
    assert "Files may have 0 B here (ulimit -f): raise the limit." in done.stderr
    assert "kept in None" not in done.stderr


def test_a_launcher_finds_no_rows_that_were_in_plain_memory(serving: Serving, run_script: Run) -> None:
    """A rank whose flight file outlives it says nothing: its launcher stores the rest."""
    lose_aggregator(serving)
    done = run_script(
        "import os, resource, signal, traceml\n"
        "os.environ['TRACEML_ADDRESS'] = f'127.0.0.1:{os.environ.pop(\"TRACEML_PORT\")}'\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "traceml.init(on_missing='warn', connect_timeout=0.2)\n"
        "for _ in range(5):\n"
        "    with traceml.trace_step():\n"
        "        pass\n"
    )

    assert done.returncode == 0
    assert "5 steps of this rank are lost, as no aggregator answered" in done.stderr
