from __future__ import annotations

import re

import msgpack
import numpy as np
import pytest

from tests.aggregator.conftest import step_rows
from tests.diagnosis.fabricated import Job, rows_of
from tests.diagnosis.hangs.standing import NOW_NS, group, in_backward, line, snapshot
from tests.fake_time import FakeTime
from traceml.aggregator.live_rows import LiveRows
from traceml.aggregator.live_verdict import LiveVerdict
from traceml.aggregator.streams.stream import Incarnation, RankStream, StreamState
from traceml.database.schema import HOST, LINES, PROCESS, USER_PHASES
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.ruleset import diagnose


def stream_of(rank: int, attempt: int = 0) -> RankStream:
    incarnation = Incarnation("host", "boot", 100 + rank, 1, f"r{rank}")
    return RankStream(rank + 1, rank, attempt, incarnation, flight="")


@pytest.fixture
def live() -> LiveRows:
    made = LiveRows(2)
    for rank in range(2):
        made.join(stream_of(rank))

    return made


class EventLog:
    """Store that only records events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict]] = []

    def event(self, kind: str, data: dict) -> None:
        self.events.append((kind, data))


def take_steps(live: LiveRows, stream: RankStream, start: int, count: int) -> None:
    live.take(stream, "steps", step_rows(start, count))


def test_frames_of_a_tick_reach_the_window_together(live):
    """Rows of all ranks are in the window after one scatter."""
    for rank in range(2):
        take_steps(live, stream_of(rank), 0, 50)

    live.scatter()

    assert live.intake.kept.latest.tolist() == [49, 49]
    assert len(live.intake.kept.aligned(20)) == 20
    assert live.fresh


def test_rows_of_an_older_attempt_stay_out(live):
    """Rows of a dead incarnation are stored, but are not the rank's newest steps."""
    take_steps(live, stream_of(0), 0, 50)
    old = stream_of(0)
    old.is_diagnosed = False
    take_steps(live, old, 0, 80)

    live.scatter()

    assert live.intake.kept.latest[0] == 49


def test_names_give_user_phases_their_names(live):
    """User phases show by the names that the rank has sent."""
    streams = [stream_of(rank) for rank in range(2)]
    for stream in streams:
        live.take(stream, "names", msgpack.packb({"id": 0, "name": "augment"}))
        take_steps(live, stream, 0, 40)
        rows = b"".join(USER_PHASES.struct.pack(step, 0, 1000, 1) for step in range(40))
        live.take(stream, "user_phases", rows)

    live.scatter()

    assert live.intake.kept.aligned().user["augment"].mean() == 1000


def test_facts_are_gathered(live):
    """The rules get loader, cores and waits for a core; exit rows wait for the rank's end."""
    stream = stream_of(0)
    live.take(stream, "info", msgpack.packb({"kind": "loader", "num_workers": 3, "training": True}))
    live.take(stream, "info", msgpack.packb({"kind": "exit", "t_ns": 1, "code": 1, "exception": "ValueError: no"}))
    live.take(stream, "host", HOST.struct.pack(0, 8, 1.0, 0, 0, 0, 0, 0, 0))
    for moment in range(2):
        values = [moment, 0, 0, 0, 0, 0, 0, 0, 0, moment * 10**9, moment * 10**9]
        live.take(stream, "process", PROCESS.struct.pack(*values))

    facts = live.intake.facts_builder.build()

    assert facts.loader is not None
    assert facts.loader.num_workers == 3
    assert facts.cores == {"host": 8}
    assert facts.wait_of_ready_time == {0: 0.5}
    assert facts.exits == ()
    assert stream.exit == {"code": 1, "exception": "ValueError: no"}


def test_end_of_a_rank_is_a_fact(live):
    """A rank that was killed is what the verdict is about."""
    stream = stream_of(1)
    stream.state = StreamState.KILLED
    stream.exit = {"signal": 9, "open_phase": "backward", "open_step": 7, "something_else": 1}

    live.end(stream)

    ended = live.intake.facts_builder.build().exits[0]
    assert (ended.rank, ended.state, ended.signal, ended.open_phase, ended.open_step) == (1, "killed", 9, "backward", 7)


@pytest.fixture
def clock(monkeypatch) -> FakeTime:
    made = FakeTime()
    monkeypatch.setattr("traceml.aggregator.live_verdict.time", made)
    return made


@pytest.mark.usefixtures("clock")
def test_verdict_is_reported_when_it_changes(live):
    """The same verdict is not stored again at once; another one is."""
    verdicts, store = LiveVerdict(live), EventLog()
    verdicts.update(store)
    assert store.events == []  # nothing has come yet

    for start in (0, 50):
        for rank in range(2):
            take_steps(live, stream_of(rank), start, 50)

        live.scatter()
        verdicts.update(store)

    assert [data["verdict"]["kind"] for _, data in store.events] == [Kind.HEALTHY]
    stream = stream_of(1)
    stream.state, stream.exit = StreamState.KILLED, {"signal": 9}
    live.end(stream)
    verdicts.update(store)
    assert store.events[-1][1]["verdict"]["kind"] == Kind.RANK_LOST
    assert verdicts.count == 3


def test_the_newest_verdict_is_stored_though_no_row_follows(live, clock):
    """One like it had been stored a moment before; its ranks may wait for ever in their next step."""
    verdicts, store = LiveVerdict(live), EventLog()
    for start in (0, 50):
        for rank in range(2):
            take_steps(live, stream_of(rank), start, 50)

        live.scatter()
        verdicts.update(store)

    assert [data["step"] for _, data in store.events] == [49]
    for _ in range(8):
        clock.now_s += 1
        verdicts.update(store)

    assert [data["step"] for _, data in store.events] == [49, 99]
    assert verdicts.count == 2


def test_rule_that_fails_costs_only_the_verdict(live, monkeypatch, caplog):
    """An error in the rules is logged, and not tried again at once."""
    monkeypatch.setattr("traceml.aggregator.live_verdict.diagnose", lambda *_: 1 / 0)
    verdicts, store = LiveVerdict(live), EventLog()
    live.fresh = True
    verdicts.update(store)
    live.fresh = True
    verdicts.update(store)

    assert caplog.text.count("the live verdict failed: ZeroDivisionError") == 1
    assert store.events == []


@pytest.mark.parametrize(("cpu_s", "count"), [(0.0, 2), (0.3, 1)], ids=["waits", "computes"])
def test_a_diagnosis_that_waited_for_a_core_delays_no_other(live, clock, monkeypatch, cpu_s, count):
    """Only what it computes makes the next one come later."""

    def diagnose_slowly(*window_and_facts):
        clock.now_s += 0.3
        clock.cpu_s += cpu_s
        return diagnose(*window_and_facts)

    monkeypatch.setattr("traceml.aggregator.live_verdict.diagnose", diagnose_slowly)
    verdicts, store = LiveVerdict(live), EventLog()
    for _ in range(2):
        live.fresh = True
        verdicts.update(store)

    assert verdicts.count == count


def test_rank_of_another_attempt_clears_nothing(live):
    """A rank of an earlier start that comes late leaves the newest steps of its successor, and adds no ranks."""
    take_steps(live, stream_of(1), 0, 50)
    live.scatter()
    for rank in (1, 5):
        late = stream_of(rank)
        late.is_diagnosed = False
        live.join(late)

    assert live.intake.kept.latest.tolist() == [-1, 49]


@pytest.mark.parametrize(("slow", "told"), [(slice(80, None), True), (slice(10, 80), False)])
def test_slow_steps_of_a_short_run_are_told_while_they_last(slow: slice, told: bool) -> None:
    """The window is the whole run so far; the report tells those that have ended, too."""

    def slower(own: dict[str, np.ndarray], _random: np.random.Generator) -> None:
        own["other"][:, slow] += 20.0

    live, store = LiveRows(1), EventLog()
    live.join(stream_of(0))
    live.take(stream_of(0), "steps", rows_of(Job(ranks=1, steps=160, grouped=False), slower)[0].tobytes())
    live.scatter()
    LiveVerdict(live).update(store)

    assert (Kind.SLOWDOWN in {each["kind"] for each in store.events[-1][1]["findings"]}) is told
    assert Kind.SLOWDOWN in {each.kind for each in diagnose(*live.intake.snapshot(200))}


def test_the_next_attempt_numbers_its_own_steps(live: LiveRows) -> None:
    """It resumes from a later checkpoint than the one before, or counts from 0."""
    for resumed_at in (5_000, 7_000, 0):
        live.begin_attempt()
        if resumed_at:
            row = {"kind": "resumed", "step": resumed_at, "before": resumed_at}
            live.take(stream_of(0), "info", msgpack.packb(row))

        assert live.facts_builder.numbers.first == resumed_at


def test_the_next_attempt_is_judged_by_its_own_rows(live: LiveRows) -> None:
    """Its processes number their lines anew, and the end of the one before is no verdict on it."""
    verdicts, store = LiveVerdict(live), EventLog()
    live.set_hang_rule(7.0, aborts=True)
    first, rows = stream_of(0), np.zeros(2, LINES.dtype)
    rows["t_ns"], rows["step"], rows["samples"] = (1, 2), (1, 2), 5
    live.take(first, "names", msgpack.packb({"id": 0, "name": "/x/train.py:1 load"}))
    live.take(first, "lines", rows.tobytes())
    first.state, first.exit = StreamState.FAILED, {"code": 1, "exception": "ValueError: bad batch"}
    live.end(first)
    verdicts.update(store)

    live.begin_attempt()
    again = stream_of(0, attempt=1)
    live.join(again)
    live.take(again, "names", msgpack.packb({"id": 0, "name": "/x/train.py:2 augment"}))
    verdicts.update(store)

    kinds = [data["verdict"]["kind"] for _, data in store.events]
    assert kinds == [Kind.RANK_LOST, Kind.INSUFFICIENT_DATA]
    assert live.facts_builder.lines.lines() == ()
    progress = live.facts_builder.progress
    assert (progress.timeout_s, progress.aborts, live.facts_builder.world_size) == (7.0, True, 2)


@pytest.mark.usefixtures("clock")
def test_what_a_verdict_waits_for_is_stored_at_once(live: LiveRows) -> None:
    """The first steps end the sentence that none was seen, though the kind stays."""
    verdicts, store = LiveVerdict(live), EventLog()
    live.fresh = True
    verdicts.update(store)
    for rank in range(2):
        take_steps(live, stream_of(rank), 0, 15)

    live.scatter()
    verdicts.update(store)
    live.fresh = True
    verdicts.update(store)

    assert [data["verdict"]["kind"] for _, data in store.events] == [Kind.INSUFFICIENT_DATA] * 2
    assert [
        re.search("no step was seen|only [0-9]+ steps", data["verdict"]["summary"])[0] for _, data in store.events
    ] == [
        "no step was seen",
        "only 12 steps",
    ]


def hang(live: LiveRows) -> None:
    """Take steps of both ranks, and then snapshots: rank 1 sleeps, and rank 0 waits for it."""
    for rank in range(2):
        take_steps(live, stream_of(rank), 0, 50)
        live.take(stream_of(rank), "process", PROCESS.struct.pack(NOW_NS, 40, *[0] * 9))

    live.scatter()
    for seen in (in_backward(0), snapshot(1, line(6, "stuck"), groups=(group(14, "all_reduce", flying=False),))):
        live.take(stream_of(seen.rank), "info", msgpack.packb(seen.to_info()))


def test_a_hang_is_reported_though_no_row_of_a_step_arrives(live):
    """The snapshots are enough, and a rank that goes on takes the verdict back."""
    verdicts, store = LiveVerdict(live), EventLog()
    hang(live)
    verdicts.update(store)
    assert [data["verdict"]["kind"] for _, data in store.events] == [Kind.HANG]

    live.take(stream_of(1), "info", msgpack.packb(snapshot(1, ended=True).to_info()))
    verdicts.update(store)
    assert store.events[-1][1]["verdict"]["kind"] == Kind.HEALTHY


def test_a_snapshot_of_another_process_counts(live):
    """For a rank that cannot take one of itself."""
    hang(live)
    live.take_snapshot(snapshot(1, line(6, "stuck"), answered="signal", process_state="S"))
    verdicts, store = LiveVerdict(live), EventLog()
    verdicts.update(store)

    assert "holds the GIL" in store.events[-1][1]["verdict"]["summary"]


def test_a_process_that_joins_again_does_not_stand_still(live):
    """Snapshots of the rank's earlier process are not about this one."""
    hang(live)
    for rank in range(2):
        live.join(stream_of(rank))

    assert not live.facts_builder.progress.has_snapshots


def test_a_run_that_was_stopped_while_it_hung_has_hung(live):
    """And one that was stopped at work has not."""
    hang(live)
    for rank in range(2):
        stream = stream_of(rank)
        stream.state, stream.exit = StreamState.KILLED, {"signal": 2}
        live.end(stream)

    assert live.has_hung("stopped")
    fresh = LiveRows(1)
    fresh.join(stream_of(0))
    take_steps(fresh, stream_of(0), 0, 50)
    fresh.scatter()
    assert not fresh.has_hung("stopped")


@pytest.mark.parametrize(("slow", "told"), [(slice(1_500, None), True), (slice(0), False), (slice(900, 1_700), False)])
def test_steps_that_became_slower_long_ago_are_told(slow: slice, told: bool) -> None:
    """The newest 200 steps alone do not show it; what never changed, or has ended, is not told."""

    def slower(own: dict[str, np.ndarray], _random: np.random.Generator) -> None:
        own["other"][:, slow] += 20.0

    live, store, verdicts = LiveRows(1), EventLog(), []
    live.join(stream_of(0))
    (rows,) = rows_of(Job(ranks=1, steps=6_000, grouped=False), slower)
    for first in range(0, len(rows), 600):
        live.take(stream_of(0), "steps", rows[first : first + 600].tobytes())
        live.scatter()
        LiveVerdict(live).update(store)
        verdicts.append({each["kind"]: each for each in store.events[-1][1]["findings"]})

    assert [Kind.SLOWDOWN in each for each in verdicts[3:]] == [told] * 7
    if told:
        assert verdicts[-1][Kind.SLOWDOWN]["evidence"]["since_step"] == pytest.approx(slow.start, abs=100)
