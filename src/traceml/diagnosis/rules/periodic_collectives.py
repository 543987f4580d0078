"""Collectives that every n-th step calls beside those of the gradients, as to average parameters or gather metrics."""

from __future__ import annotations

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from traceml.diagnosis import advice
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind, least_cost_ns
from traceml.diagnosis.rules.comm import calling_line
from traceml.diagnosis.rules.jitter import usual
from traceml.diagnosis.rules.periodic_steps import (
    MIN_LONG_STEPS_OVERSUBSCRIBED,
    MIN_PART_SHARE,
    at_distance,
    evidence_of_period,
)
from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.diagnosis.steps.own_work import OwnWork
from traceml.diagnosis.steps.speedup import speedup
from traceml.formatting import gain_text, ns_text, ordinal_text, percent_text

__all__ = ["periodic_collectives"]

SAVING_SHARE = 0.5
"""Steps of which this share saves wait for that, and do not communicate for long."""


def periodic_collectives(
    window: AlignedSteps, work: OwnWork, facts: JobFacts, step_ns: float
) -> tuple[list[Finding], OwnWork]:
    """Return the finding about long collectives at a fixed distance, and the work with steps that are shorter by them.

    Args:
        step_ns: mean step of the whole window, which costs are shares of.
    """
    if not work.grouped or facts.batches.messages:
        return [], work

    in_collectives = window.times["comm"].min(axis=0)  # of the rank that waits least for the others
    middle_ns, limit_ns = usual(in_collectives)
    usual_ns = float(np.median(work.step))
    found = at_distance(window, in_collectives, middle_ns, max(limit_ns, middle_ns + MIN_PART_SHARE * usual_ns))
    if found is None or (facts.oversubscribed and len(found[1]) < MIN_LONG_STEPS_OVERSUBSCRIBED):
        return [], work

    every, columns = found
    step = work.step.copy()
    step[columns] -= np.maximum(in_collectives[columns] - middle_ns, 0).astype(step.dtype)
    cost, phase_share = float((work.step - step).mean()), float(window.times["comm"].mean()) / step_ns
    line = calling_line(phase_share, facts)  # without one, as in a sharded model, what they wait for is not known
    if line is None or cost < least_cost_ns(step_ns) or _saves(window, columns):
        return [], work

    share = cost / step_ns
    long_ns, half = float(work.step[columns].mean()), speedup(step_ns, cost / 2)
    finding = Finding.of(
        Kind.COMM_BOUND,
        phase="comm",
        summary=(
            f"Every {ordinal_text(every)} step takes {ns_text(long_ns)} instead of {ns_text(usual_ns)}, in "
            f"collectives{line.of_it}: {percent_text(share)} of step time."
        ),
        next=f"{advice.for_comm(facts, 'comm', cost, line)} Half as often makes the run {gain_text(half)}.",
        evidence=evidence_of_period(work, every, columns, usual_ns, long_ns) | line.evidence(phase_share),
        cost_share=share,
        speedup_if_fixed=half,
    )
    return [finding], replace(work, step=step)


def _saves(window: AlignedSteps, columns: NDArray[np.intp]) -> bool:
    """Return whether some rank saves in most of these steps: the others may wait for it, in turns."""
    return float((window.times["checkpoint"][:, columns].max(axis=0) > 0).mean()) >= SAVING_SHARE
