"""The recorder against a real aggregator: init, rows, outages, refusals, statistics."""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
import os
import random
import signal
import socket
import sys
import threading
import time
import weakref
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import traceml
from tests.aggregator.conftest import TOKEN, Serving
from tests.eventually import eventually
from tests.ports import free_port
from tests.recorder.conftest import Run, stored_steps
from traceml import settings
from traceml.clock import process_start_ticks
from traceml.database.flight.flight_folders import default_folder, find_flights
from traceml.database.flight.postmortem import read_flight
from traceml.errors import AggregatorRefusedError, AggregatorUnavailableError
from traceml.recorder import lifecycle, recording, run_notices
from traceml.recorder.lines.line_sampler import LineSampler
from traceml.settings import Config
from traceml.transport.client import Connection

pytestmark = pytest.mark.usefixtures("quiet_process")


def recorder_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "traceml-recorder"]


def my_flights() -> list[Path]:
    """Return the flight files of this process, and none of an ended one that had its number."""
    mine = f"{os.getpid()}-{process_start_ticks(os.getpid())}-"
    return [path for path in find_flights(default_folder(), pid=os.getpid()) if path.name.startswith(mine)]


def do_steps(count: int) -> None:
    for _ in range(count):
        with traceml.trace_step(), traceml.phase("work"):
            pass


def test_steps_reach_the_store_once(serving: Serving) -> None:
    """init connects, steps are stored with their phases, shutdown leaves nothing behind."""
    recorder = traceml.init(port=serving.port, token=TOKEN)
    assert traceml.is_enabled()
    assert len(recorder_threads()) == len(my_flights()) == 1

    do_steps(200)
    traceml.shutdown()

    assert stored_steps(serving) == list(range(200))
    with serving.store() as store:
        assert len(store.rows("user_phases")) == 200
        assert "work" in {row["name"] for _, row in store.log_rows("names")}
        assert len(store.rows("process")) >= 2
        assert store.rows("telemetry")["rows_lost"][-1] == 0
    assert not traceml.is_enabled()
    assert recorder_threads() == my_flights() == []
    assert recorder.statistics().rows_acked == recorder.statistics().rows_appended > 200


@pytest.mark.parametrize("other", [True, False], ids=["in a thread of a pool", "in the main thread"])
def test_core_time_is_that_of_the_thread_that_trains(serving: Serving, other: bool) -> None:
    """The main thread of a service waits for the training, and would seem never to lack a core."""
    recorder = traceml.init(port=serving.port, token=TOKEN, sampler_intervals={"process": 0.02})

    def samples() -> int:
        return sum(each.samples for each in recorder.statistics().samplers if each.name == "process")

    def computes() -> None:
        until = time.thread_time() + 0.5
        while time.thread_time() < until:
            do_steps(1)

    def train() -> None:
        do_steps(1)
        before = samples()
        while samples() < before + 5:  # the thread that takes them may get a core late
            computes()

        computes()

    if other:
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
    else:
        train()

    traceml.shutdown()
    with serving.store() as store:
        rows = store.rows("process")

    of_steps = rows[rows["step"] > 0]["main_run_ns"]
    assert (np.diff(of_steps) >= 0).all()
    assert of_steps[-1] - of_steps[0] > 2e8


def test_the_last_telemetry_row_counts_what_the_end_sends(serving: Serving) -> None:
    """A short run sends most of its rows at its end; they are in the bytes that it reports."""
    recorder = traceml.init(port=serving.port, token=TOKEN)
    do_steps(300)
    traceml.shutdown()

    sent = recorder.statistics().bytes_sent
    with serving.store() as store:
        assert sent > store.rows("telemetry")["bytes_sent"][-1] > 300 * 104
        assert sent - store.rows("telemetry")["bytes_sent"][-1] < 400  # that row itself, and the goodbye


def test_init_is_idempotent(serving: Serving) -> None:
    """The second call returns the recorder that runs; after a shutdown a new one starts, as a run of its own."""
    first = traceml.init(port=serving.port, token=TOKEN)
    assert traceml.init(port=1) is first
    traceml.shutdown()
    traceml.shutdown()

    second = traceml.init(port=serving.port, token=TOKEN)

    assert second is not first
    assert second.enabled


def test_the_tables_of_an_ended_run_are_freed(serving: Serving) -> None:
    """Also where its verdict is due at the end of the process, which may train many models one after another."""
    flights = []
    for name in ("first", "second", "third", "fourth"):
        recorder = traceml.init(port=serving.port, token=TOKEN, run_name=name, quiet=False)
        do_steps(3)
        flights.append(weakref.ref(recorder.flight))
        traceml.shutdown()
        del recorder

    gc.collect()

    assert len(run_notices._due) >= len(flights)
    assert [flight() is not None for flight in flights] == [False, False, False, True]
    run_notices._due.clear()


def test_tools_of_the_script_do_not_follow_the_recorder(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that trace or profile each new thread: its work is none of the script's."""
    seen: set[str] = set()

    def note(frame: FrameType, _event: str, _value: object) -> None:
        if threading.current_thread().name == "traceml-recorder":
            seen.add(frame.f_code.co_name)

    monkeypatch.setattr(threading, "_trace_hook", note)
    monkeypatch.setattr(threading, "_profile_hook", note)
    recorder = traceml.init(port=serving.port, token=TOKEN, flush_interval=0.05)
    do_steps(5)
    assert recorder.wait_until_stored(120)

    assert "_run" in seen
    assert "_cycle" not in seen


def test_init_disabled_stops_a_running_recorder(serving: Serving) -> None:
    """enabled=False is obeyed, also when something runs already."""
    traceml.init(port=serving.port, token=TOKEN)

    off = traceml.init(enabled=False)

    assert not off.enabled
    assert not traceml.is_enabled()
    assert recorder_threads() == []


def test_no_aggregator_is_an_error_with_a_remedy() -> None:
    """The error names the address, the time, and what to do; nothing stays behind."""
    port = free_port()
    hook, leave = sys.excepthook, sys.exit

    with pytest.raises(AggregatorUnavailableError) as caught:
        traceml.init(port=port, connect_timeout=0.3)

    text = str(caught.value)
    for word in (f"127.0.0.1:{port}", "traceml serve", "local=True", "TRACEML_ENABLED=0", " s "):
        assert word in text
    assert isinstance(caught.value, ConnectionError)
    assert not traceml.is_enabled()
    assert recorder_threads() == my_flights() == []
    assert (sys.excepthook, sys.exit) == (hook, leave)


def test_something_else_on_the_port_is_an_error_too() -> None:
    """A program that listens and says nothing does not hold the training up."""
    with socket.create_server(("127.0.0.1", 0)) as mute, pytest.raises(AggregatorUnavailableError, match="sent no"):
        traceml.init(port=mute.getsockname()[1], connect_timeout=0.3)


def test_a_launchers_aggregator_that_still_starts_is_waited_for(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its socket takes the connection before: no job fails because its aggregator is slow to start."""
    monkeypatch.setattr("traceml.recorder.recording.START_S", 240.0)
    monkeypatch.setenv("TRACEML_ADDRESS", f"127.0.0.1:{serving.port}")
    serving.process.send_signal(signal.SIGSTOP)
    threading.Timer(1.0, serving.process.send_signal, (signal.SIGCONT,)).start()

    assert traceml.init(token=TOKEN, connect_timeout=0.2).statistics().connected


def test_warn_goes_on_and_connects_later(tmp_path: Path, serving: Serving, caplog: pytest.LogCaptureFixture) -> None:
    """With on_missing=warn steps before the aggregator's start are kept, and stored when it comes."""
    serving.kill()
    with caplog.at_level(logging.WARNING, "traceml"):
        traceml.init(port=serving.port, token=TOKEN, on_missing="warn", connect_timeout=0.2)
        do_steps(50)

    assert len([r for r in caplog.records if "no traceml aggregator answered" in r.getMessage()]) == 1

    serving.start()
    recorder = traceml.init()
    eventually(lambda: recorder.statistics().connected)
    do_steps(50)
    traceml.shutdown()

    assert stored_steps(serving) == list(range(100))


def test_a_short_training_waits_for_an_aggregator_that_starts_slowly(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a busy host: the end comes while it starts, and would leave no run and no report."""
    dialing, joined = threading.Event(), threading.Event()
    join, dial = threading.Thread.join, recording.dial

    def impatient(self: threading.Thread, timeout: float | None = None) -> None:
        join(self, timeout if joined.is_set() else 0)
        joined.set()

    def slow(config: Config, *args: Any, **kwargs: Any) -> Connection:
        dialing.set()
        joined.wait(60)  # the recorder's end has given up, unless it waits for this
        return dial(config.replaced(local=False), *args, **kwargs)

    monkeypatch.setattr(threading.Thread, "join", impatient)
    monkeypatch.setattr(recording, "dial", slow)
    config = settings.load(port=serving.port, token=TOKEN, local=True)
    recorder = lifecycle.start(config, wait=False)
    do_steps(20)
    assert dialing.wait(60)
    assert recorder.stop(timeout_s=30)
    assert stored_steps(serving) == list(range(20))


@pytest.mark.parametrize("supervised", [True, False])
def test_a_launcher_finds_the_rows_of_a_rank_that_never_met_an_aggregator(
    quiet_process: None, monkeypatch: pytest.MonkeyPatch, supervised: bool
) -> None:
    """They stay in the flight file for the aggregator of the launcher; without a launcher the file is removed."""
    port = free_port()
    if supervised:
        monkeypatch.setenv("TRACEML_ADDRESS", f"127.0.0.1:{port}")

    recorder = traceml.init(port=port, token=TOKEN, on_missing="warn", connect_timeout=0.2)
    do_steps(5)
    assert not recorder.stop(timeout_s=0.3)

    left = my_flights()
    assert len(left) == supervised
    for path in left:
        assert read_flight(path).counters("steps").appended == 5
        path.unlink()


def test_a_wrong_token_is_refused(serving: Serving, caplog: pytest.LogCaptureFixture) -> None:
    """It raises; with on_missing=warn the training goes on untraced by anyone."""
    with pytest.raises(AggregatorRefusedError, match="wrong token: both sides need the same TRACEML_TOKEN"):
        traceml.init(port=serving.port, token="wrong")

    with caplog.at_level(logging.WARNING, "traceml"):
        recorder = traceml.init(port=serving.port, token="wrong", on_missing="warn")
    assert recorder.enabled
    assert not recorder.statistics().connected
    assert "in a file of settings. Training continues" in caplog.text


def test_no_row_is_lost_or_doubled_when_the_aggregator_dies(serving: Serving) -> None:
    """Rows appended before, during and after an outage are stored once each, without random numbers of a script."""
    drawn = random.getstate()
    recorder = traceml.init(port=serving.port, token=TOKEN, flush_interval=0.05)
    do_steps(500)
    eventually(lambda: recorder.statistics().rows_acked > 100)

    serving.kill()
    do_steps(500)
    eventually(lambda: not recorder.statistics().connected)
    serving.start()
    eventually(lambda: recorder.statistics().connected)
    do_steps(500)
    traceml.shutdown()

    assert stored_steps(serving) == list(range(1500))
    assert recorder.statistics().reconnects >= 1
    assert recorder.statistics().rows_lost == 0
    assert random.getstate() == drawn


def test_rows_beyond_the_ring_are_counted_exactly(serving: Serving) -> None:
    """After an outage that was too long, stored and lost rows add up to what was appended."""
    recorder = traceml.init(port=serving.port, token=TOKEN, ring_rows=4096)
    eventually(lambda: recorder.statistics().connected)
    serving.kill()
    do_steps(10_000)
    serving.start()
    traceml.shutdown()
    statistics = recorder.statistics()

    with serving.store() as store:
        kept, lost = store.stored("steps"), store.lost("steps")
    assert kept + lost == 10_000
    assert lost > 5_000
    assert statistics.rows_lost >= lost


def test_statistics_are_a_frozen_record(serving: Serving) -> None:
    """They hold rank, address, counts and costs."""
    disabled = traceml.init(enabled=False).statistics()
    recorder = traceml.init(port=serving.port, token=TOKEN, sampler_intervals={"process": 0.05})
    samples = eventually(lambda: [s for s in recorder.statistics().samplers if s.name == "process" and s.samples > 3])
    eventually(lambda: recorder.statistics().clock_rtt_ns is not None, "an answer of the aggregator's clock")
    statistics = recorder.statistics()

    assert disabled.state == "disabled"
    assert (statistics.state, statistics.rank, statistics.world_size) == ("running", 0, 1)
    assert statistics.address == f"127.0.0.1:{serving.port}"
    assert statistics.errors == 0
    assert statistics.bytes_sent > 0
    assert samples[0].interval_s == 0.05
    with pytest.raises(dataclasses.FrozenInstanceError):
        statistics.rank = 1  # type: ignore[misc]


def test_commands_reach_the_rank(serving: Serving) -> None:
    """A client's command reaches the rank through the aggregator; an unknown one is answered with an error."""
    recorder = traceml.init(port=serving.port, token=TOKEN)
    eventually(lambda: recorder.statistics().connected)

    known = serving.ask("statistics")
    unknown = serving.ask("dance")

    assert "'state': 'running'" in str(known)
    assert "knows no command 'dance'" in str(unknown)


def test_a_broken_turn_does_not_end_the_thread(serving: Serving, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged once and counted; the cycles after it send as before."""
    recorder = traceml.init(port=serving.port, token=TOKEN)
    done = threading.Event()
    with caplog.at_level(logging.WARNING, "traceml"):
        for _ in range(3):
            recorder.after(0.0, lambda: done.set() or 1 // 0)
            assert done.wait(240)
            done.clear()
        eventually(lambda: recorder.statistics().errors == 3)

    do_steps(10)
    traceml.shutdown()

    assert len([r for r in caplog.records if "recorder's thread" in r.getMessage()]) == 1
    assert stored_steps(serving) == list(range(10))
    with serving.store() as store:
        assert store.streams()[0].facts["failures"]["recorder"] >= 3  # sent with the bye, shown in the report


def test_a_rank_that_has_returned_samples_no_lines(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the other ranks in an open step: its samples there would be of no line of the training."""
    samplers: list[LineSampler] = []
    sampled = threading.Event()

    def sample(self: LineSampler, wait: object) -> None:
        samplers.append(self)
        self.due_s = time.monotonic() + 0.01
        sampled.set()

    monkeypatch.setattr(LineSampler, "sample", sample)
    recorder = traceml.init(port=serving.port, token=TOKEN)
    do_steps(3)
    assert sampled.wait(240)

    lifecycle.note_return(is_script=True)

    eventually(lambda: samplers[-1].due_s == math.inf)
    cycle = threading.Event()
    recorder.after(0.0, cycle.set)
    assert cycle.wait(240)
    assert samplers[-1].due_s == math.inf


def test_traced_functions_and_data(serving: Serving) -> None:
    """@trace with and without a name, and trace_data, work whether decorated before init or after."""

    @traceml.trace
    def augment(value: int) -> int:
        return value + 1

    @traceml.trace("other name")
    def prepare(value: int) -> int:
        return value * 2

    assert augment(1) == 2
    items = [1, 2, 3]
    assert list(traceml.trace_data(items)) == items

    traceml.init(port=serving.port, token=TOKEN)
    for item in traceml.trace_data(items):
        with traceml.trace_step():
            assert prepare(augment(item)) == 2 * (item + 1)
    traceml.shutdown()

    with serving.store() as store:
        assert {row["name"] for _, row in store.log_rows("names")} >= {"augment", "other name"}
        assert sum(store.rows("steps")["input_wait_ns"] > 0) >= 2


def test_a_rank_loads_no_code_that_few_runs_use(run_script: Run) -> None:
    """A megabyte of compiled modules takes 3.4 of the training process."""
    code = """
    import sys, traceml
    traceml.init()
    with traceml.trace_step():
        pass
    traceml.shutdown()
    rare = ["traceml.recorder.profile_server", "traceml.samplers.nvml_health", "numpy", "pydantic", "asyncio"]
    print([name for name in rare if name in sys.modules])
    """
    done = run_script(code)

    has_driver = Path("/dev/nvidiactl").exists()
    assert done.stdout.split("\n")[-2] == str(["traceml.samplers.nvml_health"] * has_driver), done.stderr


def test_debug_log_shows_connection_and_decisions(run_script: Run) -> None:
    """TRACEML_LOG_LEVEL=debug writes them to standard error, without any logging set up by the script."""
    code = "import traceml\ntraceml.init()\n"
    silent, verbose = run_script(code), run_script(code, TRACEML_LOG_LEVEL="debug")

    assert silent.stderr == ""
    for line in ("connected to the aggregator at", "started <traceml recorder of rank 0 of 1", "ends as finished"):
        assert line in verbose.stderr


@pytest.mark.parametrize("late_s", ["0", "8"])
def test_a_group_that_is_initialized_later_gives_the_rank(serving: Serving, run_script: Run, late_s: str) -> None:
    """Children of mp.spawn that call init before init_process_group become ranks of one run, and nothing else."""
    done = run_script(
        """
        import os, sys, time, torch, torch.distributed as dist, torch.multiprocessing as mp, traceml
        import traceml.recorder.recording

        def train(rank, port, late_s):
            if late_s and rank == 0:
                traceml.recorder.recording._PROVISIONAL_S = 5.0  # it waits in init_process_group for longer

            time.sleep(rank * late_s)
            traceml.init()
            dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
            for _ in range(20):
                with traceml.trace_step():
                    dist.all_reduce(torch.ones(1))
            traceml.shutdown()
            dist.destroy_process_group()

        if __name__ == "__main__":
            mp.spawn(train, (sys.argv[1], float(sys.argv[2])), nprocs=2)
        """,
        str(free_port()),
        late_s,
    )

    assert done.returncode == 0, done.stderr
    assert len(serving.run_dirs) == 1
    with serving.store() as store:
        streams = {(stream.identity.rank, stream.facts["world_size"]) for stream in store.streams()}
        assert streams == {(0, 2), (1, 2)}
        assert store.stored("steps") == 40


def test_a_failed_start_leaves_nothing(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Hooks that cannot be put in place are said; samples and rows still flow."""
    import traceml.instrument

    def broken(*_args: object, **_options: object) -> None:
        raise RuntimeError("this torch is unknown")

    monkeypatch.setattr(traceml.instrument, "install", broken)
    with caplog.at_level(logging.WARNING, "traceml"):
        recorder = traceml.init(port=serving.port, token=TOKEN)
    eventually(lambda: recorder.statistics().rows_acked > 0)
    with traceml.trace_step(), traceml.phase("x"):
        pass

    assert "this torch is unknown" in caplog.text


CLOSES_ALL = """
import os, socket, threading, time, traceml
recorder = traceml.init(flush_interval=0.02)
def train(steps):
    for step in range(steps):
        with traceml.trace_step():
            time.sleep(0.001)
        traceml.log_metric("loss", step)
train(20)
waits, is_done = threading.Event(), threading.Event()
# The recorder's thread also opens files for a moment; one that is closed meanwhile cannot be told from another's.
recorder.after(0.0, lambda: (waits.set(), is_done.wait()))
waits.wait()
os.closerange(3, 256)
pairs = [socket.socketpair() for _ in range(6)]
files = [open(f"file-{number}", "w+") for number in range(12)]
is_done.set()
train(300)
for number, file in enumerate(files):
    file.write(str(number))
traceml.shutdown()
for number, file in enumerate(files):
    file.seek(0)
    assert file.read() == str(number)
for pair in pairs:
    for one, other in (pair, reversed(pair)):
        one.sendall(b"own")
        assert other.recv(100) == b"own"
"""


def test_a_script_that_closes_all_descriptors_keeps_those_that_it_opens_then(serving: Serving, run_script: Run) -> None:
    """They may have the numbers of the recorder's: it writes to none, closes none, and connects again."""
    done = run_script(CLOSES_ALL)

    assert done.returncode == 0, done.stderr
    assert stored_steps(serving) == list(range(320))


def test_no_descriptor_of_ours_has_the_number_of_a_closed_standard_stream(run_script: Run) -> None:
    """A daemon's may be closed: what a library printed there went into the tables of the recorder."""
    done = run_script(
        """
        import ctypes, os, traceml  # libffi keeps a file open from then on

        os.closerange(0, 3)
        traceml.init()
        assert [os.path.realpath(f"/proc/self/fd/{number}") for number in range(3)] == 3 * [os.devnull]
        """
    )

    assert done.returncode == 0


def test_a_script_waits_for_signals_that_it_blocks(run_script: Run) -> None:
    """A thread of ours that did not block them got one, and the script ended by it."""
    done = run_script(
        """
        import os, signal, traceml

        traceml.init()
        traceml.log_artifact(__file__)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.sigtimedwait({signal.SIGTERM}, 60) is not None
        """
    )

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("launches", [True, False])
def test_a_script_that_launches_functions_is_reported(serving: Serving, run_script: Run, launches: bool) -> None:
    """The workers are not its ranks: it has no steps."""
    done = run_script(
        """
        import sys, time, traceml

        if __name__ == "__main__":
            traceml.init()
            if sys.argv[1] == "True":
                traceml.launch(time.time, hostnames=["localhost"], workers_per_host=1, backend=None)
            traceml.shutdown()
        """,
        str(launches),
    )

    assert done.returncode == 0, done.stderr
    with serving.store() as store:
        assert ("launches" in {row["kind"] for _, row in store.log_rows("info")}) is launches
