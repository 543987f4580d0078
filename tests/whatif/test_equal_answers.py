"""Tests that the rules' estimate and the simulation of `traceml whatif` give one answer for the same rows."""

from __future__ import annotations

import numpy as np
import pytest

from tests.diagnosis.fabricated import Fault, Job, adds, takes_turns, window_of
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.ruleset import diagnose
from traceml.diagnosis.steps.own_work import OwnWork, own_work_of
from traceml.diagnosis.steps.speedup import new_step_times, with_typical_work
from traceml.whatif.operations import JobTrace, Layout, Operation
from traceml.whatif.simulation import Simulator

NS_PER_S = 1e9
KINDS = ("forward-compute", "backward-compute", "grads-reduce-scatter")
EVEN = Job(ranks=4, sigma=0.05, comm=3.0)
ALL = np.ones((1, len(KINDS), EVEN.ranks), bool)


def work(*faults: Fault) -> OwnWork:
    return own_work_of(window_of(EVEN, *faults), JobFacts(world_size=EVEN.ranks, backend="nccl"))


def durations_s(own: OwnWork) -> np.ndarray:
    """Return the seconds of a step's operations: before backward, backward, and the collective after the last rank."""
    backward = own.parts["backward"]
    collective = np.broadcast_to(np.maximum(own.step - own.longest(own.own), 0), backward.shape)
    return np.stack([own.own - backward, backward, collective]) / NS_PER_S


def as_trace(own: OwnWork) -> JobTrace:
    """Return the operations of a window, with their times as a profiler would have recorded them."""
    before, backward, collective = durations_s(own)
    arrival = before + backward
    starts = np.stack([np.zeros_like(before), before, arrival])
    waiting = arrival.max(axis=0) + collective - arrival
    return JobTrace(
        layout=Layout(dp_size=EVEN.ranks, world_size=EVEN.ranks),
        operations=tuple(Operation(kind, 0, 0, 0, 0, 0 if kind in KINDS[:2] else -1) for kind in KINDS),
        dp_ranks=tuple(range(EVEN.ranks)),
        steps=tuple(range(before.shape[1])),
        steps_left_out=0,
        ranks=np.arange(EVEN.ranks)[:, None],
        start_s=starts,
        duration_s=np.stack([before, backward, waiting]),
    )


def simulated_gain(own: OwnWork, changed: OwnWork) -> float:
    """Return old / new step time by simulation, where operations take the times of a changed window."""
    simulator = Simulator(as_trace(own))
    recorded = float(simulator.mean_step_s(ALL)[0])
    simulator.ideal_s = np.concatenate([durations_s(changed)[:2], simulator.own_s[2:]])
    return recorded / float(simulator.mean_step_s(~ALL)[0])


def estimated_gain(own: OwnWork, part: str, values: np.ndarray) -> float:
    """Return old / new step time as the rules estimate it."""
    return own.step_ns / float(new_step_times(own, {part: values}).mean())


def straggler(*faults: Fault) -> Finding:
    found = diagnose(window_of(EVEN, *faults), JobFacts(world_size=EVEN.ranks, backend="nccl"))
    return next(each for each in found if each.kind.rule.is_straggler)


FAULTS = {
    "one rank": (("forward", adds("forward", 6, (1,))),),
    "one rank, now and then": (("backward", adds("backward", 20, (2,), every=5)),),
    "two ranks": (("forward", adds("forward", 6, (1, 3))),),
    "by turns": (("forward", takes_turns("forward", 12, (0, 1, 2, 3))),),
    "none": (("forward", adds("forward", 0, (1,))),),
}


@pytest.mark.parametrize("name", FAULTS)
def test_equal_work_gives_one_gain(name):
    part, fault = FAULTS[name][0]
    own = work(fault)
    values = np.full_like(own.parts[part], own.parts[part].mean())

    assert estimated_gain(own, part, values) == pytest.approx(
        simulated_gain(own, own.changed({part: values}, own.step)), rel=0.01
    )


@pytest.mark.parametrize("rank", [0, 3])
def test_a_late_rank_with_typical_work_gives_one_gain(rank):
    own = work(adds("forward", 6, (rank,)))
    late, others = np.array([rank]), np.array([row for row in range(EVEN.ranks) if row != rank])
    values = with_typical_work(own.parts["forward"], late, others)
    simulated = simulated_gain(own, own.changed({"forward": values}, own.step))

    assert simulated > 1.2
    assert estimated_gain(own, "forward", values) == pytest.approx(simulated, rel=0.01)
    assert straggler(adds("forward", 6, (rank,))).speedup_if_fixed == pytest.approx(simulated, rel=0.02)
