"""Following a run through its store."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from tests.diagnosis.fabricated import Job, adds, rows_of
from tests.runs.fabricated_store import add_rank, run_facts
from traceml.clock import boot_id, monotonic_ns
from traceml.database.store.store import StoreWriter
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.ruleset import diagnose
from traceml.diagnosis.steps.kept_steps import KeptSteps
from traceml.errors import StoreError
from traceml.run_folder import STORE_NAME
from traceml.runs.live_run import LiveRun
from traceml.runs.report.report_types import Report


def test_it_waits_for_a_store_that_is_not_there_yet(tmp_path):
    """Before the store exists the report is empty; afterwards the store is followed."""
    live = LiveRun(tmp_path)

    assert live.refresh() is False
    assert live.report() == Report.empty(tmp_path.name)
    with StoreWriter(tmp_path / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(state="running", ended=None, world_size=1))
        add_rank(writer, 0, rows_of(Job(ranks=1, steps=60, grouped=False))[0], state="running")

    assert live.refresh() is True
    assert live.report().steps.count == 60
    assert live.report().verdict.kind == "COMPUTE_BOUND"
    live.close()


def test_only_what_is_new_is_read(tmp_path):
    """A refresh without new rows returns False; new rows add steps."""
    rows = rows_of(Job(ranks=1, steps=200, grouped=False))[0]
    writer = StoreWriter(tmp_path / STORE_NAME)
    writer.put_meta("run", run_facts(state="running", ended=None, world_size=1))
    stream = add_rank(writer, 0, rows[:128], state="running")
    writer.commit()
    live = LiveRun(tmp_path)

    assert [live.refresh(), live.refresh()] == [True, False]
    writer.append(stream, "steps", 128, 72, rows[128:].tobytes(), 128, 199)
    writer.commit()

    assert live.refresh() is True
    assert live.report().steps.count == 200
    assert not live.ended
    writer.close()


class _Clock:
    """A clock in place of the module `time` that a test sets."""

    def __init__(self, monkeypatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(sys.modules[LiveRun.__module__], "time", SimpleNamespace(monotonic=lambda: self.now_s))


def _followed_rates(tmp_path, clock, rows, arrivals, seconds, every_s=0.25):
    """Return (second, rate) of a run whose rows arrive then: `arrivals` are seconds and rows that are there."""
    writer = StoreWriter(tmp_path / STORE_NAME)
    writer.put_meta("run", run_facts(state="running", ended=None, world_size=1))
    stream = add_rank(writer, 0, rows[:1], state="running")
    writer.commit()
    live, found, there = LiveRun(tmp_path), [], 1
    for tick in range(int(seconds / every_s)):
        second = tick * every_s
        for number in [number for at_s, number in arrivals if number > there and at_s <= second]:
            writer.append(stream, "steps", there, number - there, rows[there:number].tobytes(), there, number - 1)
            writer.commit()
            there = number

        clock.now_s = 1000.0 + second
        live.refresh()
        found.append((second, live.report().steps.per_second))

    writer.close()
    live.close()
    return found


def test_the_speed_is_zero_while_no_steps_come(tmp_path, monkeypatch):
    """During a long evaluation between fast steps the live speed is 0, and not that of the last steps."""
    rows = rows_of(Job(ranks=1, steps=600, grouped=False))[0]
    step_s = float(np.diff(rows["t_end_ns"].astype(np.int64)).mean()) / 1e9
    per_s = int(1 / step_s)
    arrivals = [(second, 1 + second * per_s) for second in range(1, 7)]

    rates = _followed_rates(tmp_path, _Clock(monkeypatch), rows, arrivals, 16)

    assert [rate for second, rate in rates if 3 < second < 8] == pytest.approx([per_s] * 19, rel=0.1)
    assert {rate for second, rate in rates if second > 11} == {0.0}


def test_the_speed_of_slow_steps_stays_between_them(tmp_path, monkeypatch):
    """Where steps, or their frames, come every 10 s, their speed is shown in between, too."""
    rows = rows_of(Job(ranks=1, steps=6, own={"forward": 10_000.0}, grouped=False))[0]
    gaps_s = [(after - before) / 1e9 for before, after in pairwise(rows["t_end_ns"].tolist())]
    arrivals = [(int(sum(gaps_s[:n])), n + 1) for n in range(1, 5)]

    rates = _followed_rates(tmp_path, _Clock(monkeypatch), rows, arrivals, arrivals[-1][0] + 15, every_s=1.0)

    assert [rate for second, rate in rates if second > arrivals[1][0]] == pytest.approx([1 / gaps_s[0]] * 33, rel=0.2)


@pytest.mark.parametrize(("step_ms", "rate"), [(20.0, 0.0), (10_000.0, 0.1)])
def test_the_speed_of_a_run_that_stopped_before_it_was_opened_is_zero(tmp_path, monkeypatch, step_ms, rate):
    """A page that is opened during a hang sees no step come; steps of 10 s may come later."""
    rows = rows_of(Job(ranks=1, steps=60, own={"forward": step_ms}, comm=0.0, grouped=False))[0]
    clock = _Clock(monkeypatch)
    with StoreWriter(tmp_path / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(state="running", ended=None, world_size=1))
        add_rank(writer, 0, rows, state="running")

    live = LiveRun(tmp_path)
    for _ in range(20):
        live.refresh()
        clock.now_s += 0.5

    assert live.report().steps.per_second == pytest.approx(rate, rel=0.1)
    live.close()


@pytest.mark.parametrize(("age_s", "is_zero"), [(30, True), (1, False)])
def test_the_first_look_at_a_run_that_stopped_shows_no_speed(tmp_path, age_s, is_zero):
    """A monitoring system asks now and then."""
    rows = rows_of(Job(ranks=1, steps=60, grouped=False))[0]
    rows["t_end_ns"] += monotonic_ns() - age_s * 10**9 - rows["t_end_ns"][-1]
    with StoreWriter(tmp_path / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(state="running", ended=None, world_size=1))
        add_rank(writer, 0, rows, state="running", boot_id=boot_id())

    live = LiveRun(tmp_path)
    live.refresh()

    assert (live.report().steps.per_second == 0) is is_zero
    live.close()


def test_the_aggregators_verdict_is_shown(tmp_path):
    """The live verdict comes from the store's events, so that all screens agree."""
    kept = KeptSteps(256)
    with StoreWriter(tmp_path / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(state="running", ended=None))
        for rank, rows in enumerate(rows_of(Job(steps=100), adds("forward", 20, (1,)))):
            add_rank(writer, rank, rows, state="running")
            kept.scatter(np.full(len(rows), rank), rows)

        told = [finding.to_dict() for finding in diagnose(kept.aligned(), JobFacts(world_size=2))]
        writer.event("verdict", {"verdict": told[0], "findings": told, "step": 99})

    live = LiveRun(tmp_path)
    live.refresh()

    assert live.findings[0].kind == "COMPUTE_STRAGGLER"
    assert live.report().verdict.ranks == (1,)
    assert [event.kind for event in live.events] == ["verdict"]


@pytest.mark.parametrize("is_told", [False, True])
def test_before_the_aggregators_verdict_each_refresh_judges_again(tmp_path, is_told):
    """What is shown while the training starts is what is known now, not what was known at the first look.

    The aggregator may have told that no step was seen, too.
    """
    rows = rows_of(Job(ranks=1, steps=15, grouped=False))[0]
    writer = StoreWriter(tmp_path / STORE_NAME)
    writer.put_meta("run", run_facts(state="running", ended=None, world_size=1))
    stream = add_rank(writer, 0, rows[:8], state="running")
    if is_told:
        told = [each.to_dict() for each in diagnose(KeptSteps(64).aligned(), JobFacts())]
        writer.event("verdict", {"verdict": told[0], "findings": told, "step": None})

    writer.commit()
    live = LiveRun(tmp_path)
    live.refresh()
    early = live.findings[0].next
    writer.append(stream, "steps", 8, 7, rows[8:].tobytes(), 8, 14)
    writer.commit()
    live.refresh()
    writer.close()

    assert [early, live.findings[0].next] == [
        "Wait for more steps: 5 of 20 so far, after the first ones.",
        "Wait for more steps: 12 of 20 so far, after the first ones.",
    ]


def test_a_restart_starts_the_windows_again(tmp_path):
    """A new attempt's steps are not mixed with the old ones."""
    writer = StoreWriter(tmp_path / STORE_NAME)
    writer.put_meta("run", run_facts(state="running", ended=None, world_size=1))
    add_rank(writer, 0, rows_of(Job(ranks=1, steps=150, grouped=False))[0], attempt=0, state="failed")
    writer.commit()
    live = LiveRun(tmp_path)
    live.refresh()
    add_rank(writer, 0, rows_of(Job(ranks=1, steps=40, grouped=False))[0], attempt=1, state="running")
    writer.commit()
    live.refresh()

    assert live.report().steps.count == 40
    assert live.report().run.attempt == 1
    writer.close()


def test_the_speed_is_zero_until_a_restarted_run_steps(tmp_path, monkeypatch):
    """The speed of the attempt before is over, also where its last step was a moment ago."""
    clock, rows = _Clock(monkeypatch), rows_of(Job(ranks=1, steps=150, grouped=False))[0]
    writer = StoreWriter(tmp_path / STORE_NAME)
    writer.put_meta("run", run_facts(state="running", ended=None, world_size=1))
    stream = add_rank(writer, 0, rows[:50], attempt=0, state="running")
    writer.commit()
    live = LiveRun(tmp_path)
    live.refresh()
    writer.append(stream, "steps", 50, 100, rows[50:].tobytes(), 50, 149)
    writer.commit()
    clock.now_s += 1
    live.refresh()
    found = [live.report().steps.per_second]
    for count in (0, 40):
        add_rank(writer, 0, rows[:count], attempt=1, state="running")
        writer.commit()
        clock.now_s += 1
        live.refresh()
        found.append(live.report().steps.per_second)

    writer.close()

    assert [rate > 0 for rate in found] == [True, False, True]
    live.close()


def test_a_run_that_ended_is_diagnosed_by_its_rows(tmp_path):
    """After the end the findings are those of the stored rows, not of the live verdict."""
    with StoreWriter(tmp_path / STORE_NAME) as writer:
        writer.put_meta("run", run_facts())
        for rank, rows in enumerate(rows_of(Job(steps=100), adds("input_wait", 20, (0,)))):
            add_rank(writer, rank, rows)

    live = LiveRun(tmp_path)
    live.refresh()

    assert live.ended
    assert (live.findings[0].kind, live.findings[0].ranks) == ("INPUT_STRAGGLER", (0,))


def test_a_damaged_store_is_reported(tmp_path):
    """A store that cannot be read is an error, not an empty screen."""
    (tmp_path / STORE_NAME).write_bytes(b"not a database, for sure" * 50)

    with pytest.raises(StoreError):
        LiveRun(tmp_path).refresh()
