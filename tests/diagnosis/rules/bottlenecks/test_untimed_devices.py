"""CPU times of a training whose device has none: what reads from it next seems to take the time of its computation."""

from __future__ import annotations

import pytest
from msgspec import structs

from tests.diagnosis.fabricated import Job, adds, window_of
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.job_facts_builder import JobFactsBuilder
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.ruleset import diagnose

ALONE, PAIR = Job(ranks=1, grouped=False), Job(ranks=2)


def facts_of(device: str, world_size: int = 1) -> JobFacts:
    """Return the facts of a model on a device, with the line that reads the loss."""
    builder = JobFactsBuilder(world_size)
    builder.info(0, {"kind": "model", "device": device, "trainable": 10_000})
    lines = [SampledLine(0, "other", "/me/train.py", 8, "main", None, 80)]
    return structs.replace(builder.build(), lines=lines)


def found(kind: Kind, device: str, *, part: str, late: bool, timed: bool = False) -> Finding:
    window = window_of(PAIR if late else ALONE, adds(part, 10.0, ranks=(0,)))
    known = facts_of(device, 2 if late else 1)
    return next(each for each in diagnose(structs.replace(window, device=timed), known) if each.kind is kind)


@pytest.mark.parametrize(
    ("kind", "part", "late"),
    [
        (Kind.RESIDUAL_HEAVY, "other", False),
        (Kind.RESIDUAL_HEAVY, "user", False),
        (Kind.H2D_BOUND, "h2d", False),
        (Kind.STRAGGLER, "other", True),
        (Kind.COMPUTE_STRAGGLER, "optimizer", True),
        (Kind.H2D_STRAGGLER, "h2d", True),
    ],
)
@pytest.mark.parametrize("device", ["xpu:0", "cuda:1"])
def test_no_gain_is_promised_of_what_may_wait_for_the_device(kind: Kind, part: str, late: bool, device: str) -> None:
    """Of CUDA as well, where no step could be measured. With times of the device, or of the CPU, there is a gain."""
    finding = found(kind, device, part=part, late=late)
    name = device.partition(":")[0]

    assert finding.summary.endswith(f"; part of it may be waiting for the device ({name}), whose time is not measured.")
    assert "would be" not in finding.summary
    assert finding.speedup_if_fixed == 1.0

    for known in (found(kind, "cpu", part=part, late=late), found(kind, device, part=part, late=late, timed=True)):
        assert "waiting for the device" not in known.summary
        assert known.speedup_if_fixed > 1.2


def test_ranks_that_are_slower_in_every_part_promise_no_gain_either() -> None:
    """What they compute on the device is in one of the parts."""
    window = window_of(Job(ranks=2, skew=2.0))
    timed, untimed = (
        next(each for each in diagnose(window, facts_of(device, 2)) if each.kind is Kind.COMPUTE_STRAGGLER)
        for device in ("cpu", "xpu:0")
    )

    assert "steps would be" in timed.summary
    assert "part of it may be waiting for the device (xpu)" in untimed.summary
    assert (timed.speedup_if_fixed > 1.0, untimed.speedup_if_fixed) == (True, 1.0)


@pytest.mark.parametrize("late", [False, True])
def test_waiting_for_data_is_no_waiting_for_the_device(late: bool) -> None:
    """The loader does not read from it."""
    finding = found(Kind.INPUT_STRAGGLER if late else Kind.INPUT_BOUND, "xpu:0", part="input_wait", late=late)

    assert "waiting for the device" not in finding.summary
