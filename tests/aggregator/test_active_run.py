"""Ends of runs, with the clock set forward."""

from __future__ import annotations

import time
import tracemalloc

import msgpack
import pytest

from tests.aggregator.conftest import step_row
from tests.aggregator.test_registry import Silent, hello, join, leave, registry  # noqa: F401 - a fixture
from tests.fake_time import FakeTime
from traceml.aggregator import active_run as run_module
from traceml.aggregator.streams.stream import StreamState
from traceml.database.flight.flight import FlightFile
from traceml.database.flight.flight_folders import pending_row_path
from traceml.database.flight.flight_header import FlightState
from traceml.database.flight.staged_files import STAGED, StagedFile
from traceml.database.schema import LOGGED, STEPS, Slot
from traceml.database.store.reader import StoreReader
from traceml.diagnosis.facts.ends import END
from traceml.run_folder import STORE_NAME
from traceml.transport.exit_report import ExitReport
from traceml.trusted_files import make_trusted_folder


@pytest.fixture
def clock(monkeypatch):
    """A monotonic clock that the test moves."""

    moved = FakeTime()
    monkeypatch.setattr(run_module, "time", moved)
    monkeypatch.setattr("traceml.aggregator.streams.run_streams.time", moved)
    monkeypatch.setattr("traceml.aggregator.streams.stream.time", moved)
    return moved


def remote(rank: int, world_size: int = 2, **facts):
    """A rank of another host."""
    return hello(rank, world_size, host="far", boot_id="another", **facts)


def test_run_is_over_a_moment_after_the_last_bye(registry, clock):  # noqa: F811
    """Between the last bye and the end there is time for a rank that is about to connect."""
    run, first = join(registry, hello(0))
    _, second = join(registry, hello(1))
    leave(run, first)
    assert not run.is_over(has_launcher=False)
    leave(run, second)
    run.commit()
    assert not run.is_over(has_launcher=False)

    clock.now_s += run_module.JOIN_GRACE_S + 0.1

    assert run.is_over(has_launcher=False)
    assert not run.is_over(has_launcher=True)
    assert run.end()
    assert run.state == "finished"


@pytest.mark.parametrize("jump_s", [-172_800.0, 3600.0])
def test_a_wall_clock_that_is_set_changes_no_duration(registry, monkeypatch, jump_s):  # noqa: F811
    """Start and end of the run and of its ranks are as far apart as the monotonic clock says."""
    run, stream = join(registry, hello(0, 1))
    now_s, now_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: now_s() + jump_s)
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + int(jump_s * 1e9))
    leave(run, stream)
    assert run.end()

    with StoreReader(run.path / STORE_NAME) as reader:
        facts, [stored] = reader.meta()["run"], reader.streams()
    assert 0 <= facts["ended"] - facts["started"] < 60
    assert 0 <= stored.facts["ended"] - stored.facts["started"] < 60


def test_silent_rank_of_another_host_is_lost_after_a_while(registry, clock):  # noqa: F811
    """Nobody can look whether its process lives, so silence has to do; until then it may come back."""
    run, stream = join(registry, remote(0, 1))
    run.disconnected(stream)
    clock.now_s += run_module.LOST_AFTER_S - 1
    run.check_absent()
    assert stream.state is StreamState.RUNNING

    clock.now_s += 2
    run.check_absent()
    run.commit()
    clock.now_s += 1

    assert stream.state is StreamState.LOST
    assert run.is_over(has_launcher=False)
    assert run.end()
    assert run.state == "lost"


def test_lost_rank_that_comes_back_is_running_again(registry, clock):  # noqa: F811
    """A network that was away for long costs nothing but the wrong word for a while."""
    run, stream = join(registry, remote(0, 1))
    run.disconnected(stream)
    clock.now_s += run_module.LOST_AFTER_S + 1
    run.check_absent()

    assert join(registry, remote(0, 1)) == (run, stream)
    assert stream.state is StreamState.RUNNING


def test_failed_job_that_may_be_restarted_is_waited_for(registry, clock):  # noqa: F811
    """While torchrun may start its workers again, the run stays open for the next attempt."""
    run, stream = join(registry, hello(0, 1, restarts_left=1))
    leave(run, stream, "failed")
    run.commit()
    clock.now_s += run_module.RESTART_S - 1
    assert not run.is_over(has_launcher=False)

    clock.now_s += 2

    assert run.is_over(has_launcher=False)
    assert run.end()
    assert run.state == "failed"


def test_ranks_that_never_come_are_not_waited_for_for_ever(registry, clock):  # noqa: F811
    """A job of which only some ranks ever connected ends a minute after they have left."""
    run, stream = join(registry, hello(0, 2))
    leave(run, stream)
    run.commit()
    clock.now_s += run_module.ABANDONED_S - 1
    assert not run.is_over(has_launcher=False)

    clock.now_s += 2

    assert run.is_over(has_launcher=False)


@pytest.mark.parametrize(
    ("exitcode", "state", "fact"),
    [(-15, "killed", {"signal": 15}), (3, "failed", {"code": 3}), (0, "finished", {"code": 0})],
)
def test_launcher_reports_how_a_process_ended(registry, exitcode, state, fact):  # noqa: F811
    """A signal, a status and a normal end are distinguished; the stream is found by pid."""
    run, stream = join(registry, hello(0, 1))
    run.disconnected(stream)

    run.take_exit(ExitReport(rank=7, pid=stream.incarnation.pid, exitcode=exitcode))

    assert stream.state == state
    assert fact.items() <= stream.exit.items()


@pytest.mark.parametrize(
    ("exits", "status", "state"),
    [
        ([{"exitcode": -2}, {"exitcode": -15, "stopped": True}], 130, "stopped"),
        ([{"exitcode": 130}, {"exitcode": 130}], 130, "stopped"),
        ([{"exitcode": -15, "stopped": True}, {"exitcode": -15, "stopped": True}], 143, "stopped"),
        ([{"exitcode": -9}, {"exitcode": -2}], 137, "failed"),
        ([{"exitcode": 1}, {"exitcode": -15, "stopped": True}], 1, "failed"),
    ],
)
def test_run_that_was_ended_by_hand_is_stopped(registry, exits, status, state):  # noqa: F811
    """Ctrl-C, or the launcher's end, is no failure; a rank that failed by itself is."""
    run, first = join(registry, hello(0, 2))
    _, second = join(registry, hello(1, 2, pid=first.incarnation.pid + 1))
    for stream, report in zip((first, second), exits, strict=True):
        run.disconnected(stream)
        run.take_exit(ExitReport(rank=stream.rank, pid=stream.incarnation.pid, **report))

    run.end_remaining(status)

    assert run.end(status)
    assert run.state == state


def test_rank_that_got_the_jobs_signal_before_its_launcher_has_not_failed(registry):  # noqa: F811
    """A scheduler signals all processes of a job at once."""
    run, stream = join(registry, hello(0, 1))
    run.disconnected(stream)
    now_s = time.time()
    stream.exit["at_s"] = now_s - 1.2
    run.take_exit(ExitReport(rank=0, pid=stream.incarnation.pid, exitcode=-15))
    run.note_ending({"signal": 15, "time": now_s})

    assert run.end(143)
    assert run.state == "stopped"


def test_the_signal_that_ended_an_attempt_did_not_end_the_next(registry):  # noqa: F811
    """A requeued job comes again under its id, and one that lost a preempted node goes on without it."""
    run, first = join(registry, hello(0, 1, run_id="exp"))
    run.note_ending({"signal": 15, "time": time.time()})
    run.disconnected(first)
    run.take_exit(ExitReport(rank=0, pid=first.incarnation.pid, exitcode=-15, stopped=True))

    _, again = join(registry, hello(0, 1, run_id="exp", recorder="s", attempt=1))
    assert not run.has_ending
    assert run.live.facts_builder.ended_by is None
    leave(run, again)

    assert run.end(0)
    assert run.state == "finished"
    with StoreReader(run.path / STORE_NAME) as store:
        assert "ended_by" not in store.last_event(END).data


def test_job_that_was_interrupted_before_its_ranks_came_is_stopped(registry):  # noqa: F811
    """The launcher's exit status tells."""
    run, stream = join(registry, hello(0))
    leave(run, stream)

    assert run.end(130)
    assert run.state == "stopped"


def test_ranks_of_two_hosts_with_the_same_pid_are_told_apart(registry):  # noqa: F811
    """A launcher over hosts names the host with the pid: containers number their processes alike."""
    run, near = join(registry, hello(0, 2, pid=7, host="near"))
    _, far = join(registry, remote(1, pid=7))

    run.take_exit(ExitReport(rank=1, local_rank=0, host="far", pid=7, exitcode=-9))
    run.take_exit(ExitReport(rank=0, local_rank=0, host="near", pid=7, exitcode=-15, stopped=True))
    run.disconnected(far)
    run.disconnected(near)
    run.check_absent()  # at once: what is known to be dead is not waited for

    assert (near.state, near.exit["signal"], near.exit["stopped"]) == (StreamState.KILLED, 15, True)
    assert (far.state, far.exit["signal"]) == (StreamState.KILLED, 9)


def test_rank_whose_host_is_out_of_reach_is_lost(registry):  # noqa: F811
    """A launcher that lost a host knows no exit code; it does not claim that the process has ended."""
    run, stream = join(registry, remote(0, 1))
    run.disconnected(stream)

    run.take_exit(ExitReport(rank=0, host="far", pid=stream.incarnation.pid, lost="its network is down"))
    run.end_remaining(1)

    assert stream.state is StreamState.LOST
    assert "process_gone" not in stream.exit


@pytest.mark.parametrize(("later", "is_unknown"), [("nothing", True), ("exit", True), ("bye", False)])
def test_what_a_lost_host_appended_is_not_known(registry, later, is_unknown):  # noqa: F811
    """Its rows after the last one here cannot be counted, until it comes back and says bye."""
    run, stream = join(registry, remote(0, 1))
    run.disconnected(stream)
    far = {"rank": 0, "host": "far", "pid": stream.incarnation.pid}
    run.take_exit(ExitReport(**far, lost="its network is down"))
    if later == "exit":
        run.take_exit(ExitReport(**far, exitcode=1))
    elif later == "bye":
        join(registry, remote(0, 1))
        leave(run, stream)

    run.commit()

    with StoreReader(run.path / STORE_NAME) as reader:
        (record,) = reader.streams()
    assert record.facts["total_unknown"] is is_unknown
    assert record.facts["exit"].get("unsent", False) is is_unknown


def test_rank_that_was_dead_before_its_first_word_was_read(registry, tmp_path):  # noqa: F811
    """Its process was never seen here, but its flight file shows that it is dead: nothing is waited for."""
    path = tmp_path / "1-2-0.flight"
    path.touch()
    run, stream = join(registry, hello(0, 1, pid=2**22 + 1, flight=str(path)))
    assert not stream.seen_here
    run.disconnected(stream)
    run.check_absent()

    assert stream.state is StreamState.LOST
    assert stream.exit["process_gone"]


def test_the_middle_of_a_loop_is_known_when_the_flight_file_is_gone(registry, tmp_path):  # noqa: F811
    """The launcher may report exit code 0 after the rows of a rank that left by os._exit are stored."""
    flight = FlightFile.create(tmp_path, {})
    flight.open_slots[Slot.STEP], flight.open_slots[Slot.ITERATING] = 7, 1
    path = flight.path
    flight.close(unlink=False)
    run, stream = join(registry, hello(0, 1, pid=2**22 + 1, flight=str(path)))
    run.disconnected(stream)
    run.check_absent()
    run.commit(force=True)
    path.unlink(missing_ok=True)

    run.take_exit(ExitReport(pid=stream.incarnation.pid, exitcode=0))

    assert stream.exit["code"] == 0
    assert stream.state is StreamState.LOST


def test_files_of_a_dead_rank_are_stored_once(registry, tmp_path):  # noqa: F811
    """Its launcher may report its end before the rows, which its spool still has, are stored."""
    flight = FlightFile.create(tmp_path, {})
    spool = flight.staging_folder
    make_trusted_folder(spool, private=True)
    for step in (1, 2):  # both with the time that a script gave
        row = {"kind": "image", "name": "sample", "t_ns": 5, "step": step}
        path = pending_row_path(spool, step)
        StagedFile(path, {}).contents.write_bytes(b"png")
        path.write_bytes(msgpack.packb({**row, STAGED: {"limit_bytes": 100, "suffix": ".png"}}))

    path = flight.path
    flight.close(unlink=False)
    run, stream = join(registry, hello(0, 1, pid=2**22 + 1, flight=str(path)))
    run.disconnected(stream)
    run.check_absent()

    run.take_exit(ExitReport(pid=stream.incarnation.pid, exitcode=-9))

    run.commit(force=True)
    with StoreReader(run.path / STORE_NAME) as reader:
        assert [row["step"] for _, row in reader.log_rows(LOGGED.name)] == [1, 2]
    assert not spool.exists()


def test_a_dead_rank_ended_by_the_clock_of_the_run(registry, tmp_path):  # noqa: F811
    """Else the first of several that died is the one whose host has the clock that is most behind."""
    flight = FlightFile.create(tmp_path, {})
    path = flight.path
    flight.close(unlink=False)
    run, stream = join(registry, hello(0, 2, pid=2**22 + 1, flight=str(path)))
    stream.clock_shift_ns = 1_800_000_000_000
    run.disconnected(stream)
    run.check_absent()

    assert stream.exit["at_s"] == pytest.approx(time.time() + 1800, abs=300)


@pytest.mark.parametrize("ending", ["nothing", "the interpreter", "shutdown"])
def test_only_a_process_whose_recorder_saw_no_end_skipped_its_exit(registry, tmp_path, ending):  # noqa: F811
    """Neither one that the interpreter ended, nor one that had ended its tracing before."""
    flight = FlightFile.create(tmp_path, {})
    if ending == "the interpreter":
        flight.open_slots[Slot.EXIT_START] = 1
    elif ending == "shutdown":
        flight.open_slots[Slot.STATE] = FlightState.FINISHED

    path = flight.path
    flight.close(unlink=False)
    run, stream = join(registry, hello(0, 2, pid=2**22 + 1, flight=str(path)))
    run.disconnected(stream)
    run.check_absent()

    assert stream.exit.get("skipped_exit") == (True if ending == "nothing" else None)


def test_the_code_of_the_process_counts_where_its_script_had_ended_well(registry, tmp_path):  # noqa: F811
    """A function that is called at exit may end the process; the row of the script is stored afterwards."""
    flight = FlightFile.create(tmp_path, {})
    flight.log("info").append({"kind": "exit", "t_ns": 1, "code": 0, "last_step": 7})
    path = flight.path
    flight.close(unlink=False)
    run, stream = join(registry, hello(0, 1, pid=2**22 + 1, flight=str(path)))
    run.disconnected(stream)

    run.take_exit(ExitReport(pid=stream.incarnation.pid, exitcode=5))

    assert (stream.exit["code"], stream.exit["last_step"]) == (5, 7)
    assert stream.state is StreamState.FAILED


def test_failure_after_a_clean_bye_counts(registry):  # noqa: F811
    """A process that said bye and then crashed on its way out has failed."""
    run, stream = join(registry, hello(0, 1))
    leave(run, stream)
    assert stream.state is StreamState.FINISHED

    run.take_exit(ExitReport(pid=stream.incarnation.pid, exitcode=-11))

    assert stream.state is StreamState.KILLED


@pytest.mark.parametrize("report", [ExitReport(), ExitReport(rank=9, pid=1, exitcode=0), ExitReport(rank=0)])
def test_exits_without_a_rank_are_ignored(registry, report):  # noqa: F811
    """Nothing is guessed from an exit that names no rank of this run."""
    run, stream = join(registry, hello(0, 1))

    run.take_exit(report)

    assert stream.state is StreamState.RUNNING
    assert stream.exit == {}


def test_process_that_died_before_a_recorder_began_is_reported_by_its_launcher_alone(registry, clock):  # noqa: F811
    """Killed while it still started up, a rank is in the report all the same, with its signal."""
    run, stream = join(registry, hello(0, 1))
    leave(run, stream)
    run.take_exit(ExitReport(rank=1, local_rank=1, pid=999_999, exitcode=-9))
    run.take_exit(ExitReport(rank=2, local_rank=2, pid=999_998, exitcode=0))
    run.take_exit(ExitReport(rank=3, local_rank=0, pid=None, host="far", lost="its network is down"))

    run.add_unmatched_exits()

    assert [(each.rank, str(each.state)) for each in run.streams] == [(0, "finished"), (1, "killed"), (3, "lost")]
    assert run.streams[1].exit == {"signal": 9, "at_s": pytest.approx(time.time(), abs=60)}
    assert run.streams[2].incarnation.host == "far"
    assert run.world_size == 4
    assert run.end()
    assert run.state == "failed"


def test_exit_of_an_earlier_attempt_is_not_the_later_ones(registry):  # noqa: F811
    """A rank that died unknown, and ran to its end when it was started again, has not failed."""
    run, stream = join(registry, hello(0, 1, attempt=1))
    leave(run, stream)

    run.take_exit(ExitReport(rank=0, local_rank=0, pid=999_999, exitcode=-9))
    run.add_unmatched_exits()

    assert [str(each.state) for each in run.streams] == ["finished"]
    assert stream.exit == {}


def test_exit_of_a_process_is_not_that_of_another_host_with_its_pid(registry):  # noqa: F811
    """In containers ranks have the same few pids; a rank here that was stopped is not the later one there."""
    run, here = join(registry, hello(0, 2, run_id="j", pid=20))
    run.disconnected(here)
    _, there = join(registry, hello(1, 2, run_id="j", host="far", pid=20, recorder="far", attempt=1))
    leave(run, there)

    run.take_exit(ExitReport(rank=0, pid=20, exitcode=-15, stopped=True))

    assert here.exit["signal"] == 15
    assert (str(there.state), there.exit) == ("finished", {})


def test_last_rank_of_a_large_job_may_connect_first(registry):  # noqa: F811
    """The window is sized by the world before the rank joins it: 4,096 steps of 1,024 ranks would take 230 MB."""
    tracemalloc.start()
    try:
        run, _ = join(registry, hello(1023, 1024))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak_bytes < 16e6
    assert run.world_size == len(run.live.intake.kept.latest) == 1024


@pytest.mark.parametrize(("ranks", "interval_s"), [(1, 1.0), (100, 1.0), (1_000, 10.0), (10_000, 60.0)])
def test_many_ranks_send_their_samples_less_often(registry, ranks, interval_s):  # noqa: F811
    """All of them together send about as many frames as a hundred do."""
    run, _ = join(registry, hello(0, ranks))

    assert run.sample_interval_s == interval_s


def test_late_rank_of_an_earlier_attempt_does_not_resize_the_job(registry):  # noqa: F811
    """The job was restarted with fewer ranks; one of the first start connects after that."""
    run, _ = join(registry, hello(0, 2, attempt=1, recorder="new"))
    join(registry, hello(7, 8, recorder="old"))

    assert run.world_size == len(run.live.intake.kept.latest) == 2


@pytest.mark.parametrize("first", [0, 2])
def test_hosts_whose_launchers_count_restarts_differently_are_in_one_attempt(registry, first):  # noqa: F811
    """torchrun's agent on `b` starts its ranks again because `a` has failed, and counts no restart for that."""
    hosts = {0: "a", 1: "a", 2: "b", 3: "b"}
    order = sorted(hosts, key=lambda rank: (rank - first) % 4)

    def start(pid, counts):
        each = [
            hello(
                rank,
                4,
                run_id="j",
                host=hosts[rank],
                pid=pid + rank,
                recorder=f"{pid + rank}",
                attempt=counts[hosts[rank]],
            )
            for rank in order
        ]
        return [join(registry, one) for one in each]

    for pid, counts, attempt in (
        (2**22, {"a": 0, "b": 0}, 0),
        (2**22 + 10, {"a": 1, "b": 0}, 1),
        (2**22 + 20, {"a": 1, "b": 1}, 2),
        (2**22 + 30, {"a": 2, "b": 2}, 3),
    ):
        joined = start(pid, counts)
        run = joined[0][0]
        assert [(each is run, stream.attempt) for each, stream in joined] == [(True, attempt)] * 4
        assert run.is_complete
        for _, stream in joined:
            leave(run, stream, "failed")


def test_a_host_that_replaces_another_joins_the_newest_attempt(registry):  # noqa: F811
    """Its agent is new, and has counted no restart."""
    run, first = join(registry, hello(0, 2, run_id="j", host="a", pid=2**22, attempt=2))
    _, new = join(registry, hello(1, 2, run_id="j", host="c", pid=2**22 + 1, recorder="c"))
    assert (first.attempt, new.attempt) == (2, 2)

    for stream in (first, new):
        leave(run, stream, "failed")

    _, newest = join(registry, hello(1, 2, run_id="j", host="d", pid=2**22 + 2, recorder="d"))
    _, again = join(registry, hello(0, 2, run_id="j", host="a", pid=2**22 + 3, recorder="e", attempt=3))
    assert (newest.attempt, again.attempt) == (3, 3)


def test_rows_that_the_verdict_cannot_take_are_stored_and_acknowledged(registry, caplog):  # noqa: F811
    """The rank that leaves gets its answer, and the next rows count again."""
    run, stream = join(registry, hello(0, 1))
    take, run.live.intake.kept.scatter = run.live.intake.kept.scatter, lambda *_: 1 / 0
    run.ingest.take(stream, STEPS.name, 0, 1, step_row(0))
    leave(run, stream)

    assert run.commit()
    assert "the live verdict of run" in caplog.text

    run.live.intake.kept.scatter = take
    run.ingest.take(stream, STEPS.name, 1, 1, step_row(1))
    assert run.commit()
    assert run.live.intake.kept.latest.tolist() == [1]


def test_run_that_is_over_keeps_no_window(registry):  # noqa: F811
    """An aggregator remembers a hundred of them; the windows come back with a rank that reconnects."""
    run, stream = join(registry, hello(0, 1))
    run.ingest.take(stream, "names", 0, 1, msgpack.packb({"id": 0, "name": "augment"}))
    leave(run, stream)
    assert run.end()

    assert not len(run.live.intake.kept.latest)

    assert join(registry, hello(0, 1)) == (run, stream)
    assert len(run.live.intake.kept.latest) == 1
    assert run.live.intake.names[0] == {0: "augment"}


def test_many_ranks_of_ended_runs_are_not_remembered(registry, monkeypatch):  # noqa: F811
    """The bound is on ranks too, as each costs some kilobytes; the newest run stays."""
    monkeypatch.setattr("traceml.aggregator.registry._REMEMBERED_STREAMS", 3)
    runs = []
    for job in ("a", "b", "c"):
        for rank in range(2):
            run, stream = join(registry, hello(rank, run=job))
            leave(run, stream)

        assert run.end()
        registry.mark_ended(run)
        runs.append(run)

    assert [registry.find(run.key) for run in runs] == [None, None, runs[2]]


class CountedRows(list):
    """Rows that count how often they are walked."""

    walks = 0

    def __iter__(self):
        self.walks += 1
        return super().__iter__()


def test_reopened_run_reads_its_logs_once(registry, monkeypatch):  # noqa: F811
    """However many ranks it has; each gets its own names and its own exit."""
    streams = []
    for rank in range(4):
        run, stream = join(registry, hello(rank, 4))
        run.ingest.take(stream, "names", 0, 1, msgpack.packb({"id": 0, "name": f"phase {rank}"}))
        run.ingest.take(stream, "info", 0, 1, msgpack.packb({"kind": "exit", "t_ns": 1, "code": rank}))
        streams.append(stream)

    run.close()
    walked = []

    def counted(reader, name, _read=StoreReader.log_rows):
        walked.append(CountedRows(_read(reader, name)))
        return walked[-1]

    monkeypatch.setattr(StoreReader, "log_rows", counted)
    again = run_module.ActiveRun(run.path, run.key, named=False)

    assert [stream.names for stream in again.streams] == [stream.names for stream in streams]
    assert [stream.exit for stream in again.streams] == [{"code": rank} for rank in range(4)]
    assert [rows.walks for rows in walked] == [1, 1]
    again.close()


def test_exit_of_a_rank_beyond_any_world_is_ignored(registry):  # noqa: F811
    """The number in a report must not size the windows."""
    run, _ = join(registry, hello(0, 1))
    run.take_exit(ExitReport(rank=2**40, local_rank=0, pid=99, exitcode=1))
    run.add_unmatched_exits()

    assert run.world_size == len(run.streams) == 1


def test_a_run_began_with_the_script_of_its_first_rank(registry):  # noqa: F811
    """By that script's age; a rank that comes later changes nothing."""
    before = time.time()
    run, _ = join(registry, hello(0, script_ms=60_000))
    started = run._facts.values["started"]
    assert before <= started + 60 <= time.time()

    join(registry, hello(1, script_ms=3_600_000))
    assert run._facts.values["started"] == started


def test_a_checkpoint_counts_that_was_saved_by_a_rank_whose_end_is_seen_late(registry, tmp_path):  # noqa: F811
    """A busy aggregator may learn of an attempt's end, and of what it saved, when the next one has read it."""
    flight = FlightFile.create(tmp_path, {})
    flight.open_slots[Slot.SAVED], flight.open_slots[Slot.SAVED_IN] = 20, 5
    path = flight.path
    flight.close(unlink=False)
    run, stream = join(registry, hello(0, 1, pid=2**22 + 1, flight=str(path)))
    run.disconnected(stream)
    _, next_one = join(registry, hello(0, 1, pid=2**22 + 2, recorder="s", attempt=1))
    run.ingest.take(next_one, "info", 0, 1, msgpack.packb({"kind": "loaded", "t_ns": 1, "place": 5}))
    assert next_one.resumes_at == 0

    run.check_absent()

    assert next_one.resumes_at == 20


def test_a_rank_that_tells_something_after_its_exit_has_hung_all_the_same(registry):  # noqa: F811
    """What it wrote on its way out was progress live, and none for the report: `stopped`, with the verdict HANG."""
    run, stream = join(registry, hello(0, 1))
    quiet = {"kind": "snapshot", "quiet_s": 99.0, "step": 7, "in_step": True, "answered": "recorder"}
    rows = [
        {"kind": "process", "t_ns": 5},
        {**quiet, "t_ns": 10, "at_ns": 10},
        {"kind": "exit", "t_ns": 20, "code": 130, "exception": "KeyboardInterrupt"},
        {"kind": "limits", "t_ns": 30},
    ]
    for number, row in enumerate(rows):
        run.ingest.take(stream, "info", number, 1, msgpack.packb(row))

    leave(run, stream, "failed")
    run.live.scatter()
    _, facts = run.live.intake.snapshot(64)

    assert facts.progress.ranks[0].snapshot.answered == "recorder"
