"""Following a run through its store."""

from __future__ import annotations

import numpy as np
import pytest

from tests.diagnosis.fabricated import Job, adds, rows_of
from tests.runs.fabricated_store import add_rank, run_facts
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


def test_before_the_aggregators_verdict_each_refresh_judges_again(tmp_path):
    """What is shown while the training starts is what is known now, not what was known at the first look."""
    rows = rows_of(Job(ranks=1, steps=15, grouped=False))[0]
    writer = StoreWriter(tmp_path / STORE_NAME)
    writer.put_meta("run", run_facts(state="running", ended=None, world_size=1))
    stream = add_rank(writer, 0, rows[:8], state="running")
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
