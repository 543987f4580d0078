"""Numbers of a run's steps, and what depends on which of them are the first."""

from __future__ import annotations

import numpy as np
import pytest

from tests.diagnosis.fabricated import Job, rows_of
from traceml.database.schema import PAUSES, Compiled, Pause
from traceml.diagnosis.facts.pauses import PauseHistory
from traceml.diagnosis.facts.trainings.step_numbers import StepNumbers
from traceml.diagnosis.intake import RowIntake
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.ruleset import diagnose

BEFORE = 5_000
RESUMED = {"kind": "resumed", "step": BEFORE, "before": BEFORE}


@pytest.mark.parametrize(
    ("rows", "first", "before"),
    [
        ([], 0, 0),
        ([(0, RESUMED), (1, RESUMED)], BEFORE, BEFORE),
        ([(0, RESUMED), (0, {"step": 9_000, "before": 8_000})], BEFORE, 8_000),
        ([(0, {"step": 1_030, "before": 1_000})], 0, 1_000),  # after 30 steps
        ([(0, {"step": "7", "before": None})], 0, 0),
    ],
)
def test_the_first_step_and_those_of_another_run(rows, first: int, before: int) -> None:
    """A script may number its steps before the first one, or later."""
    numbers = StepNumbers()
    for rank, row in rows:
        numbers.take(rank, row)

    assert (numbers.first, numbers.before(0, 10_000)) == (first, before)
    assert numbers.is_given() is bool(before)


def test_compiling_in_the_first_steps_of_a_resumed_run_is_set_up() -> None:
    """And in its later steps it is not."""
    numbers = StepNumbers()
    numbers.take(0, RESUMED)
    pauses = PauseHistory({}, numbers)
    rows = np.zeros(3, PAUSES.dtype)
    rows["step"], rows["ns"] = [BEFORE, BEFORE + 9, BEFORE + 10], 10**9
    rows["cause"], rows["detail"] = Pause.COMPILATION, Compiled.FIRST
    pauses.add(0, rows)

    assert pauses.set_up_compile_s(0) == 2.0


@pytest.mark.parametrize("before", [0, BEFORE])
def test_a_resumed_run_is_judged_as_one_from_the_start(before: int) -> None:
    """Its first steps, which are long, are left out, and that it became slower is told with its own step number."""

    def slower(own: dict[str, np.ndarray], _random: np.random.Generator) -> None:
        own["other"][:, 300:] += 20.0
        own["other"][:, :10] += 3_000.0

    intake = RowIntake(1_024, 1)
    if before:
        intake.facts_builder.info(0, RESUMED)

    (rows,) = rows_of(Job(ranks=1, steps=600, grouped=False), slower)
    rows["step"] += before
    intake.add("steps", 0, rows.tobytes())
    intake.flush()
    window, facts = intake.snapshot(1_024)
    found = {each.kind: each for each in diagnose(window, facts)}

    assert window.steps[0] == before + 10
    assert Kind.JITTER not in found
    assert found[Kind.SLOWDOWN].evidence["since_step"] == pytest.approx(before + 300, abs=10)
