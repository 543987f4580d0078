"""One intake for rows from the wire and rows from a store."""

from __future__ import annotations

import numpy as np

from tests.diagnosis.fabricated import Job, rows_of
from traceml.database.schema import HOST, STEPS, USER_PHASES
from traceml.diagnosis.facts.ends import RankExit
from traceml.diagnosis.intake import RowIntake


def test_step_rows_of_all_ranks_reach_the_window_with_a_flush() -> None:
    """Added rows wait for the flush, which returns whether there were any."""
    intake = RowIntake(128, 2)
    for rank, rows in enumerate(rows_of(Job(steps=50))):
        for start in (0, 30):
            intake.add(STEPS.name, rank, rows[start : start + 30].tobytes())

    before = intake.kept.latest.max()

    assert before == -1
    assert (intake.flush(), intake.flush()) == (True, False)
    assert intake.kept.latest.tolist() == [49, 49]


def test_user_phases_and_facts_are_taken_at_once() -> None:
    """User phases have the rank's names, host rows give the cores, other tables are ignored."""
    intake = RowIntake(128, 1)
    intake.names[0] = {3: "augment"}
    intake.facts_builder.host(0, "h")
    rows, user, host = np.zeros(40, STEPS.dtype), np.zeros(40, USER_PHASES.dtype), np.zeros(1, HOST.dtype)
    rows["step"] = user["step"] = np.arange(40)
    rows["total_ns"], rows["user_ns"], rows["backward_own_ns"] = 2_000, 1_000, -1
    user["name_id"], user["ns"], host["cores"] = 3, 1_000, 8
    for table, data in ((STEPS, rows), (USER_PHASES, user), (HOST, host)):
        intake.add(table.name, 0, data.tobytes())

    intake.add("metrics", 0, b"")
    intake.flush()
    window, facts = intake.snapshot(last=20)

    assert window.user["augment"].mean() == 1_000
    assert facts.cores == {"h": 8}


def test_a_rank_that_ended_is_a_fact_and_is_not_waited_for() -> None:
    """The others' steps go on without it."""
    intake = RowIntake(128, 2)
    rows = rows_of(Job(steps=60))
    intake.add(STEPS.name, 0, rows[0].tobytes())
    intake.add(STEPS.name, 1, rows[1][:20].tobytes())
    intake.flush()
    intake.end(RankExit(rank=1, state="killed", signal=9))

    window, facts = intake.snapshot(last=20)

    assert window.steps[-1] == 59
    assert facts.exits[0].last_step == 19
