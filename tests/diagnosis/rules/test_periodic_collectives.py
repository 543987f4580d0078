"""Long collectives at a fixed distance are named with it, and are no jitter."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.diagnosis.fabricated import MS, Fault, Job, adds, window_of
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.facts.shared_batches import BatchHistory
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.ruleset import diagnose

LINES = [
    SampledLine(
        0, "comm", "/me/train.py", 13, "average", "/lib/torch/distributed/distributed_c10d.py:9 all_reduce", 60
    ),
    SampledLine(0, "backward", "/me/train.py", 30, "train", None, 190),
]


def found(*faults: Fault, history: BatchHistory | None = None, ranks: tuple[int, ...] = (0, 1)) -> list[Finding]:
    """Return the findings of two ranks of which some are in collectives for 120 ms of each 25th step."""
    window = window_of(Job(ranks=2, steps=300), *faults)
    long = window.steps % 25 == 12
    window.total[:, long] += 120 * MS
    for rank in ranks:
        window.times["comm"][rank, long] += 120 * MS
        window.wait[rank, long] += 120 * MS

    return diagnose(window, JobFacts(world_size=2, lines=LINES, batches=history or BatchHistory()))


def test_collectives_of_every_nth_step_are_named() -> None:
    """Local SGD averages parameters in them: that is no jitter, nor a network that is busy at times."""
    (finding,) = found()

    assert (finding.kind, finding.phase, finding.evidence["every_n_steps"]) == (Kind.COMM_BOUND, "comm", 25)
    assert finding.evidence["function"] == "average"
    assert finding.headline.startswith("Every 25th step is long, in communication between ranks: ")
    assert "the collectives of train.py:13 average less often, on one flattened tensor" in finding.next
    assert finding.cost_share == pytest.approx(120 / 25 / (15 + 120 / 25), rel=0.15)
    assert finding.speedup_if_fixed == pytest.approx(1 / (1 - finding.cost_share / 2), rel=0.02)


def sharded(history: BatchHistory) -> None:
    history.sharding = "fsdp2"


def of_messages(history: BatchHistory) -> None:
    history.messages = True


@pytest.mark.parametrize("change", [sharded, of_messages])
def test_what_a_sharded_model_gathers_and_messages_are_no_such_collectives(
    change: Callable[[BatchHistory], None],
) -> None:
    """The advice on collectives that the script calls does not fit them."""
    history = BatchHistory()
    change(history)

    assert not any(each.kind is Kind.COMM_BOUND for each in found(history=history))


def test_a_rank_that_waits_for_another_one_is_not_communicating() -> None:
    """Rank 0 waits in each 25th step, as for an evaluation by the other."""
    assert not any(each.kind is Kind.COMM_BOUND for each in found(ranks=(0,)))


def test_ranks_that_save_in_turns_wait_for_each_other() -> None:
    """The barriers around it are in each step that saves."""
    assert not any(each.kind is Kind.COMM_BOUND for each in found(adds("checkpoint", 60, every=25)))
