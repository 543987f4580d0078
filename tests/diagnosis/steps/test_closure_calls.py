"""Steps whose optimizer calls its closure several times, beside others."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from msgspec.structs import replace

from tests.diagnosis.fabricated import Fault, Job, window_of
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.ruleset import diagnose
from traceml.diagnosis.steps.aligned_steps import AlignedSteps

REFINED = np.s_[:, 200:]
CALLS = np.array([14, 11, 11.5, 12, 12.5, 2, *[1] * 14])
"""Closure calls of twenty steps of L-BFGS, which converges in the sixth of them."""
ADAM: Mapping[str, float] = {"forward": 1.9, "backward": 3.6, "optimizer": 0.9, "other": 0.2}
JOB = Job(ranks=1, steps=220, grouped=False, own=ADAM)


def refines(own, random) -> None:
    """Steps of L-BFGS after those of Adam, on batches that are four times as large."""
    for part, ms in {"forward": 5.8, "backward": 13.0, "optimizer": 2.5, "other": 0.3}.items():
        own[part][REFINED] = ms * CALLS * random.lognormal(0, 0.03, len(CALLS))


def pauses_in(part: str) -> Fault:
    """Return a fault: some of the last steps take half a second longer in one part."""

    def pauses(own, random) -> None:
        own[part][:, 202:208] += 500

    return pauses


def said(window: AlignedSteps, closures: np.ndarray | None) -> dict[Kind, Finding]:
    flags = np.zeros(window.total.shape, bool)
    flags[:, np.isin(window.steps, 200 + np.flatnonzero(CALLS > 1)) if closures is None else closures] = True
    return {each.kind: each for each in diagnose(replace(window, closures=flags), JobFacts())}


def test_steps_of_an_optimizer_with_a_closure_are_no_jitter():
    """Five steps of 240 ms beside 205 of 7 ms, mostly backward: they have twelve times as many passes."""
    assert set(said(window_of(JOB, refines), None)) == {Kind.COMPUTE_BOUND}


def searches(own, random) -> None:
    """As long for the search along a line, which the steps with one call do not have, on a slower host."""
    refines(own, random)
    own["optimizer"][REFINED] = [91, 75, 123, 164, 203, 31, *[1.2] * 14]


def test_the_search_along_a_line_is_no_jitter():
    """Its time depends on the loss: 8 to 17 ms per call of the closure."""
    assert set(said(window_of(JOB, searches), None)) == {Kind.COMPUTE_BOUND}


def test_the_same_steps_without_a_closure_are_jitter():
    """As on a host that another program took for a second."""
    jitter = said(window_of(JOB, refines), np.zeros(0, int))[Kind.JITTER]

    assert jitter.phase == "backward"


@pytest.mark.parametrize("part", ["backward", "other"])
def test_a_pause_in_steps_with_closures_is_told(part):
    """All steps are of L-BFGS; more passes would make forward longer, too."""
    alone = Job(ranks=1, steps=220, grouped=False, own={"forward": 20.0, "backward": 40.0, "optimizer": 9.0})
    window = window_of(alone, pauses_in(part))

    assert said(window, np.arange(len(window)))[Kind.JITTER].phase == part


@pytest.mark.parametrize("part", ["backward", "other"])
def test_a_pause_is_more_than_its_passes_explain(part):
    """In steps that have more passes, too."""
    found = said(window_of(JOB, refines, pauses_in(part)), None)

    assert [found[kind].phase for kind in (Kind.JITTER, Kind.SLOWDOWN) if kind in found] == [part]
