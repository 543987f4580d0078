"""Findings about functions compiled anew: number, reason, limit, advice, and where they must stay silent."""

from __future__ import annotations

import numpy as np
import pytest

from tests.diagnosis.fabricated import MS, Job, adds, window_of
from traceml.database.schema import LINE_OTHER, PAUSES, Compiled, Pause
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.pauses import PauseHistory
from traceml.diagnosis.facts.run_time import RunTime
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind, Severity
from traceml.diagnosis.ruleset import diagnose

ALONE = Job(ranks=1, steps=220, grouped=False)
SIZE = "tensor 'x' size mismatch at index 0. expected 122, actual 121"
NAMES = {0: {5: "/x/train.py:24 forward", 6: SIZE, 7: "self.name == 'step 6'", 8: "GLOBAL_STATE changed: grad_mode"}}


def compilations(*details: Compiled, ms: float = 400, every: int = 25, guard: int = 6) -> PauseHistory:
    rows = np.zeros(len(details), PAUSES.dtype)
    rows["step"], rows["ns"], rows["count"] = 15 + np.arange(len(details)) * every, int(ms * MS), 1
    rows["cause"], rows["phase"], rows["detail"] = int(Pause.COMPILATION), LINE_OTHER, details
    rows["line_id"], rows["text_id"] = 5, np.where(rows["detail"] == Compiled.FIRST, -1, guard)
    pauses = PauseHistory(NAMES)
    pauses.add(0, rows)
    return pauses


def long_forwards(count: int, ms: float = 400, every: int = 25):
    def fault(own, _) -> None:
        own["forward"][:, 15 : 15 + count * every : every] += ms

    return fault


def found(pauses: PauseHistory, *faults, **facts) -> list[Finding]:
    return diagnose(window_of(ALONE, *faults), JobFacts(pauses=pauses, **facts))


def test_it_names_function_reason_and_limit():
    """The function with its line, how often, the last reason, and that torch has given up."""
    pauses = compilations(*[Compiled.AGAIN] * 7, Compiled.LIMIT)
    verdict = found(pauses, long_forwards(8))[0]

    assert verdict.kind is Kind.RECOMPILES
    assert "recompiled train.py:24 forward 7 times" in verdict.summary
    assert SIZE in verdict.summary
    assert "run in eager mode" in verdict.summary
    assert verdict.evidence["limit_reached"] is True
    assert verdict.cost_share == pytest.approx(8 * 400 / (14.1 * 210 + 8 * 400), rel=0.05)


@pytest.mark.parametrize(("guard", "advice"), [(6, "mark_dynamic"), (7, "as a tensor"), (8, "for evaluation")])
def test_the_advice_fits_the_reason(guard, advice):
    """Sizes, other values, and gradients that are on or off need different changes."""
    verdict = found(compilations(*[Compiled.AGAIN] * 7, guard=guard), long_forwards(7))[0]

    assert advice in verdict.next


@pytest.mark.parametrize(
    ("guard", "dimension"),
    [
        ("tensor 'x' size mismatch at index 1. expected 8, actual 9", "1"),
        ("x.size()[2] == 4", "2"),
        ("x.size(3) == 4", "3"),
        ("x.shape[0] <= 8", "0"),
        ("len(x.shape) == 2", "dim"),
    ],
)
def test_the_dimension_that_differs_is_named(guard, dimension, monkeypatch):
    """Marking another one changes nothing."""
    monkeypatch.setitem(NAMES[0], 6, guard)
    verdict = found(compilations(*[Compiled.AGAIN] * 7), long_forwards(7))[0]

    assert f"mark_dynamic(x, {dimension})" in verdict.next


def test_they_are_judged_by_the_whole_run():
    """Most of them are in the first steps, which the window leaves out."""
    pauses = compilations(*[Compiled.AGAIN] * 7, every=0)
    pauses._rows[0]["step"] = 2
    verdict = found(pauses, time=RunTime.of(10.0, {"steps": 9.0}))[0]

    assert (verdict.kind, verdict.cost_share) == (Kind.RECOMPILES, pytest.approx(0.28))


def test_a_limit_counts_without_a_cost():
    """A function that is no longer compiled is slower by an unknown amount."""
    pauses = compilations(*[Compiled.AGAIN] * 7, Compiled.LIMIT, ms=0.1)
    (verdict, *_) = found(pauses)

    assert (verdict.kind, verdict.severity) == (Kind.RECOMPILES, Severity.WARNING)
    assert verdict.gain is None
    assert "no longer compiled" in verdict.headline


def test_a_function_that_may_have_one_version_is_not_compiled_again():
    """torch._dynamo.config.recompile_limit = 1."""
    (verdict, *_) = found(compilations(Compiled.FIRST, Compiled.LIMIT, ms=0.1))

    assert verdict.summary.startswith("torch.compile compiled train.py:24 forward once; the last reason: ")
    assert (verdict.evidence["recompiles"], verdict.evidence["line"]) == (0, 24)


@pytest.mark.parametrize(
    "details",
    [(Compiled.FIRST, Compiled.AGAIN, Compiled.AGAIN), (Compiled.FIRST,) * 8],
    ids=["last batch and evaluation", "many functions"],
)
def test_compiling_once_is_silent(details):
    """It is no finding, and no jitter either."""
    kinds = {each.kind for each in found(compilations(*details), long_forwards(len(details)))}

    assert kinds == {Kind.COMPUTE_BOUND}


def test_many_functions_compiled_anew_once_are_silent():
    """A size that has changed once compiles each part of the model anew."""
    pauses = compilations(*[Compiled.AGAIN] * 8)
    pauses._rows[0]["line_id"] = np.arange(8)

    assert {each.kind for each in found(pauses, long_forwards(8))} == {Kind.COMPUTE_BOUND}


def test_all_versions_that_one_step_needs_are_no_recompilations():
    """An optimizer that is compiled for one parameter has a version for each shape; the limit of them is still told."""
    pauses = compilations(Compiled.FIRST, *[Compiled.AGAIN] * 7, every=0)
    assert not [each for each in found(pauses, time=RunTime.of(10.0, {"steps": 9.0})) if each.kind is Kind.RECOMPILES]

    pauses = compilations(Compiled.FIRST, *[Compiled.AGAIN] * 7, Compiled.LIMIT, every=0)
    assert "run in eager mode" in found(pauses)[0].summary

    pauses = compilations(Compiled.FIRST, *[Compiled.AGAIN] * 7, every=0)
    pauses._rows[0]["step"] = [1, 1, 1, 1, 1, 12, 13, 14]
    verdict = found(pauses, time=RunTime.of(10.0, {"steps": 9.0}))[0]
    assert "recompiled train.py:24 forward 3 times" in verdict.summary
    assert pauses.set_up_compile_s(0) == pytest.approx(5 * 0.4)


def test_only_first_compilations_of_the_first_steps_are_set_up():
    """Not those that a change of the inputs causes, nor those of later steps, nor those of an evaluation before."""
    pauses = compilations(Compiled.FIRST, Compiled.AGAIN, Compiled.FIRST, Compiled.FIRST, Compiled.BACKWARD)
    pauses._rows[0]["step"] = [0, 1, 12, -1, 2]

    assert pauses.set_up_compile_s(0) == pytest.approx(0.4)
    assert pauses.set_up_compile_s(1) == 0.0


def test_compilations_before_the_first_step_are_of_the_start_up():
    """Without a loader the first step begins when its model is compiled; an evaluation later has no step either."""
    pauses = compilations(*[Compiled.FIRST] * 4)
    assert pauses.early_compile_s(0) == 0.0

    pauses._rows[0]["step"], pauses._rows[0]["t_end_ns"] = [-1, -1, 0, -1], [1, 2, 3, 4]

    assert pauses.early_compile_s(0) == pytest.approx(0.8)
    assert pauses.early_compile_s(1) == 0.0


def test_long_steps_beside_them_are_still_jitter():
    """Only the time of compilations is explained."""
    kinds = {
        each.kind for each in found(compilations(Compiled.FIRST), long_forwards(1), adds("other", 150, chance=0.05))
    }

    assert Kind.JITTER in kinds


@pytest.mark.parametrize(
    ("detail", "reason", "advice"),
    [
        (Compiled.AGAIN, f" ({SIZE})", "Compile for any size"),
        (Compiled.FIRST, "", "Each version is compiled once"),
    ],
)
def test_a_long_step_that_compiled_says_so(detail: Compiled, reason: str, advice: str) -> None:
    """The last batch of the first epoch is smaller: once is no finding, but it explains the step."""
    verdict = found(compilations(detail, ms=2900), long_forwards(1, ms=2920))[0]

    assert verdict.kind is Kind.COMPUTE_BOUND
    assert f"the others: there torch.compile compiled train.py:24 forward, for 2.9 s{reason}." in verdict.summary
    assert verdict.next.startswith(advice)
    assert "in a longer run its share is smaller" in verdict.next
    assert "Find out what that step did" not in verdict.next
    assert verdict.evidence["compile_s"] == pytest.approx(2.9)


@pytest.mark.parametrize(("ms", "step"), [(900, 15), (2900, 60)])
def test_a_long_step_that_did_something_else_is_not_of_compiling(ms: float, step: int) -> None:
    """Compiling took less than half of it, or was in another step."""
    pauses = compilations(Compiled.AGAIN, ms=ms)
    pauses._rows[0]["step"] = step
    verdict = found(pauses, long_forwards(1, ms=2920))[0]

    assert "One step took 2.9" in verdict.summary
    assert "torch.compile compiled" not in verdict.summary
    assert "Find out what that step did" in verdict.next
