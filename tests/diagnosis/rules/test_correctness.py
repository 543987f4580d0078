"""Ranks on the same batches, and ranks that never exchange gradients; and those that rightly do so."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from traceml.database.schema import EPOCHS, FINGERPRINTS, STEPS, pack_bits
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.job_facts_builder import JobFactsBuilder
from traceml.diagnosis.facts.shared_batches import BatchHistory
from traceml.diagnosis.facts.topology import Topology
from traceml.diagnosis.facts.trainings.models_and_loaders import EvaluationModeSteps, LoaderFacts
from traceml.diagnosis.kinds import Severity
from traceml.diagnosis.rules.correctness import (
    duplicate_data,
    never_cleared,
    never_synchronized,
    repeated_by_workers,
    same_order,
    trained_in_evaluation_mode,
    weights_unchanged,
)

STEPS_SEEN = [0, 1, 2, 50, 51, 52]


def history(*batches: list[int], model: dict | None = None) -> BatchHistory:
    """Return the fingerprints of some ranks, each with a model."""
    found = BatchHistory()
    for rank, of_rank in enumerate(batches):
        rows = np.zeros(len(of_rank), FINGERPRINTS.dtype)
        rows["step"], rows["fingerprint"] = STEPS_SEEN[: len(of_rank)], of_rank
        found.add(rank, rows)
        found.model(rank, {"parallel": "ddp", "gradient_size": len(batches)} if model is None else model)

    return found


def facts(batches: BatchHistory, steps: int = 60, *, running: bool = False) -> JobFacts:
    state = "running" if running else "finished"
    return JobFacts(batches=batches, world_size=2, latest=(steps - 1,), state=state)


def test_equal_batches_of_all_ranks():
    """No rank has a part of its own: three of four repeat the first one's work."""
    finding = duplicate_data(JobFacts(batches=history(*([[5, 6, 7, 8]] * 4)), world_size=4))

    assert finding.ranks == ()
    assert finding.cost_share == 0.75
    assert finding.evidence == {"compared_batches": 4, "groups": [[0, 1, 2, 3]]}
    assert finding.headline == "All ranks train on identical batches"


def test_equal_batches_of_some_ranks():
    """Each host has its own part of the data, but the ranks of a host share it."""
    finding = duplicate_data(JobFacts(batches=history([1, 2, 3], [1, 2, 3], [4, 5, 6], [4, 5, 6]), world_size=4))

    assert finding.evidence["groups"] == [[0, 1], [2, 3]]
    assert finding.cost_share == 0.5


@pytest.mark.parametrize(
    "batches",
    [
        ([1, 2, 3], [4, 5, 6]),
        ([1, 2, 3, 4], [1, 2, 3, 9]),  # equal at first only
        ([1, 2], [1, 2]),  # too few
        ([7, 7, 7], [7, 7, 7]),  # one batch forever: a benchmark
    ],
)
def test_other_batches_are_no_finding(batches):
    """Ranks with parts of their own, and too little to tell."""
    assert duplicate_data(JobFacts(batches=history(*batches), world_size=2)) is None


def test_ranks_of_a_tensor_parallel_group_share_batches():
    """Only ranks that average gradients with each other are compared: 0 with 2, and 1 with 3."""
    batches = BatchHistory()
    for rank, of_rank in enumerate(([1, 2, 3], [1, 2, 3], [4, 5, 6], [4, 5, 6])):
        rows = np.zeros(3, FINGERPRINTS.dtype)
        rows["step"], rows["fingerprint"] = [0, 1, 2], of_rank
        batches.add(rank, rows)
        batches.model(rank, {"parallel": "ddp", "gradient_size": 2, "gradient_ranks": [rank % 2, rank % 2 + 2]})

    assert duplicate_data(JobFacts(batches=batches, world_size=4)) is None
    assert (
        duplicate_data(JobFacts(batches=history([1, 2, 3], [1, 2, 3], model={"parallel": "dtensor"}), world_size=2))
        is None
    )


FOUR = ([1, 2, 3], [1, 2, 3], [4, 5, 6], [4, 5, 6])


@pytest.mark.parametrize("flattened", [{}, {"dp_shard_cp": 9}])
def test_ranks_that_divide_the_sequences_of_a_batch_share_it(flattened):
    """Two replicas of two ranks each, which are one group that averages gradients."""
    mesh = {rank: {"dp_shard": rank // 2, "cp": rank % 2, **dict.fromkeys(flattened, rank)} for rank in range(4)}
    known = {"world_size": 4, "topology": Topology(mesh=mesh)}

    assert duplicate_data(JobFacts(batches=history(*FOUR), **known)) is None

    finding = duplicate_data(JobFacts(batches=history(*[FOUR[0]] * 4), **known))
    assert finding.evidence["groups"] == [[0, 2]]  # of each replica the lowest
    assert finding.cost_share == 0.5
    assert "context parallelism" not in finding.next


@pytest.mark.parametrize("name", ["tp", "inner", "dp_shard"])
def test_ranks_of_other_dimensions_are_compared(name):
    """Nothing says that they divide sequences."""
    mesh = {rank: {"dp": rank // 2, name: rank % 2} for rank in range(4)}
    finding = duplicate_data(JobFacts(batches=history(*FOUR), world_size=4, topology=Topology(mesh=mesh)))

    assert finding.evidence["groups"] == [[0, 1], [2, 3]]


@pytest.mark.parametrize("tokens", [True, False])
def test_ranks_that_may_divide_sequences_are_told_so(tokens):
    """Without a mesh that is named it is not known; only texts have sequences to divide."""
    batches = history(*FOUR)
    batches.input(0, {"tokens": tokens})
    finding = duplicate_data(JobFacts(batches=batches, world_size=4))

    assert ("If they divide the sequences of a batch (context parallelism), it is right" in finding.next) is tokens


def read_by_workers(*batches: int, workers: int = 2, begins: tuple[int, ...] = (0, 50)) -> JobFacts:
    """Return what is known of a training with these first batches of two epochs."""
    epochs = np.zeros(len(begins), EPOCHS.dtype)
    epochs["step"] = begins
    loader = LoaderFacts(dataset="Lines", num_workers=workers)
    return JobFacts(batches=history(list(batches)), epochs=epochs, loader=loader)


@pytest.mark.parametrize(
    ("batches", "workers", "share", "compared"),
    [
        ((5, 5, 6, 7, 7, 8), 2, 0.5, "(compared in 2 epochs)"),
        ((5, 5, 5, 7, 7, 7), 4, 0.75, "(those of 3 workers, compared in 2 epochs)"),
    ],
)
def test_workers_that_each_read_all_data_are_told(batches, workers, share, compared):
    """An iterable data set that does not ask which worker runs it: each epoch begins with one batch of each."""
    finding = repeated_by_workers(read_by_workers(*batches, workers=workers))

    assert finding.headline == f"Each of the {workers} loader workers reads the same data"
    assert compared in finding.summary
    assert "get_worker_info()" in finding.next
    assert finding.cost_share == share


@pytest.mark.parametrize(
    "facts",
    [
        read_by_workers(5, 6, 7, 8, 9, 10),
        read_by_workers(5, 5, 6, 7, 8, 9),  # equal in one of two epochs
        read_by_workers(5, 5, 6, 7, 7, 8, workers=3),
        read_by_workers(5, 5, 6, 7, 7, 8, workers=1),
        read_by_workers(5, 5, 5, 5, 5, 5),  # one batch forever: a benchmark
        read_by_workers(5, 5, 6, 7, 7, 8, begins=(40,)),  # the first batches are not known
        read_by_workers(5, 5, 6, 7, 7, 8, begins=()),
    ],
)
def test_workers_with_data_of_their_own_are_no_finding(facts):
    """Batches that differ, or of which too little is known."""
    assert repeated_by_workers(facts) is None


def group_of_two(*, comm_ns: int = 0, sequence: int = 0, parallel: str | None = None, size: int = 2) -> BatchHistory:
    """Return what 60 steps of two ranks tell."""
    batches = history([1, 2, 3], [4, 5, 6], model={"parallel": parallel})
    batches.group.size = size
    rows = np.zeros(60, STEPS.dtype)
    rows["step"], rows["comm_ns"] = np.arange(60), comm_ns
    rows["bits"] = [pack_bits(1, 0, 4 + sequence * step) for step in range(60)]
    for part in np.array_split(rows, 6):
        batches.group.steps(part)

    return batches


def test_ranks_without_any_collective_train_alone():
    """A process group that nobody uses."""
    finding = never_synchronized(facts(group_of_two()))

    assert finding.evidence == {"ranks": 2, "steps": 60}
    assert finding.severity == "warning"


def test_a_parallel_model_that_is_called_by_its_module_exchanges_nothing():
    """Its forward tells DistributedDataParallel to average the gradients of the next backward pass."""
    batches = group_of_two(parallel="ddp")
    batches.reduction_facts({"backwards_per_step": 1.0, "reductions_per_step": 0.0})

    finding = never_synchronized(facts(batches))

    assert ".module" in finding.next


def with_collectives(elements: tuple[int, ...], parameters: int = 10_000) -> BatchHistory:
    """Return what is known of two ranks whose collectives carried tensors of at most so many elements."""
    batches = group_of_two(comm_ns=5)
    for rank, largest in enumerate(elements):
        batches.model(rank, {"parameters": parameters})
        batches.collective(rank, {"elements": largest})

    return batches


def test_a_logged_loss_is_no_exchange_of_gradients():
    """All collectives of both ranks carry one or two numbers, of models with 10,000."""
    finding = never_synchronized(facts(with_collectives((1, 2))))

    assert "no collective of more than 2 numbers in 60 steps" in finding.summary


@pytest.mark.parametrize(
    ("batches", "steps", "running"),
    [
        (with_collectives((1, 640)), 60, False),
        (with_collectives((1,)), 60, False),  # of the other rank it is not known
        (with_collectives((40, 40), parameters=2_000), 60, False),
        (group_of_two(comm_ns=5), 60, False),
        (group_of_two(sequence=1), 60, False),
        (group_of_two(parallel="ddp"), 60, False),
        (group_of_two(size=0), 60, False),
        (group_of_two(), 30, False),
        (group_of_two(), 60, True),  # it may average its models every 100 steps
    ],
)
def test_ranks_that_communicate_or_have_no_group_are_no_finding(batches, steps, running):
    """Collectives, parallel models, independent processes, and too few steps."""
    assert never_synchronized(facts(batches, steps, running=running)) is None


@pytest.mark.parametrize(("trained", "told"), [(1, True), (0, False)])
def test_an_order_that_repeats_is_told_of_the_trainings_loader(trained: int, told: bool) -> None:
    """An evaluation may read its data in the same order each time."""
    builder = JobFactsBuilder(2)
    for number in (0, 1):
        builder.info(0, {"kind": "loader", "number": number, "num_workers": 0, "length": 100 + number})

    builder.info(0, {"kind": "same_order", "number": 1})
    builder.info(0, {"kind": "training_loader", "number": trained})

    found = same_order(builder.build())
    assert (found is not None) is told
    if found is not None:
        assert found.headline == "Each epoch has the same order: set_epoch is not called"
        assert found.severity is Severity.INFO  # never in the place of a limit


@pytest.mark.parametrize(
    ("first", "steps", "severity", "advice"),
    [
        (100, 500, "warning", "after each evaluation"),
        (100, 30, "info", "after each evaluation"),
        (0, 600, "info", "from_pretrained returns a model in eval()"),
    ],
)
def test_training_in_evaluation_mode_is_told_with_its_steps(first, steps, severity, advice):
    """From the first step on it may be meant, as without dropout in reinforcement learning."""
    builder = JobFactsBuilder()
    for each in (20, steps):
        builder.info(
            0, {"kind": "evaluation_mode", "model": "Net", "layers": ["Dropout"], "step": first, "steps": each}
        )

    found = trained_in_evaluation_mode(msgspec.structs.replace(builder.build(), latest=(599,)))

    assert found.severity == severity
    assert found.summary.startswith(f"Net was in eval() in {steps} of 600 training steps")
    assert found.evidence == {"since_step": first, "steps": steps, "layers": ["Dropout"]}
    assert advice in found.next


def test_a_training_without_zero_grad_is_told():
    """Its rows say so of the first optimizer that keeps its gradients."""
    builder = JobFactsBuilder()
    assert never_cleared(builder.build()) is None

    builder.info(0, {"kind": "kept_gradients", "optimizer": "AdamW"})
    found = never_cleared(builder.build())

    assert (found.kind, found.severity) == ("NO_ZERO_GRAD", "warning")
    assert "gradients of what AdamW trains are never cleared" in found.summary
    assert found.evidence == {"optimizer": "AdamW"}


@pytest.mark.parametrize(
    ("told", "since", "severity"), [(0, 5000, "info"), (5000, 5000, "info"), (5100, 5100, "warning")]
)
def test_steps_of_a_script_that_counts_on_are_those_of_the_run(told: int, since: int, severity: str) -> None:
    """By `set_step`, also after `eval()`: it resumed at step 5,000, and what was before is not known."""
    mode = EvaluationModeSteps(model="Net", layers=["Dropout"], step=told, steps=300)

    found = trained_in_evaluation_mode(JobFacts(evaluation_mode=mode, first_step=5000, latest=(5599,)))
    alone = never_synchronized(msgspec.structs.replace(facts(group_of_two()), first_step=5000, latest=(5059, 5059)))

    assert found.summary.startswith(f"Net was in eval() in 300 of 600 training steps (50 %), from step {since:,} on")
    assert found.severity == severity
    assert "no collective in 60 steps" in alone.summary


def unchanged(*stepped: int, trainable: int = 4, state: str = "finished", steps: int = 300, **known: Any) -> JobFacts:
    """Return facts of ranks, each with an optimizer that has changed nothing."""
    builder = JobFactsBuilder(len(stepped))
    row = {"kind": "unchanged_weights", "optimizer": "SGD", "parameters": 4, "trainable": trainable}
    for rank, each in enumerate(stepped):
        builder.info(rank, row | {"stepped": each})

    return msgspec.structs.replace(builder.build(), latest=(steps - 1,) * len(stepped), state=state, **known)


@pytest.mark.parametrize(
    ("facts_of_it", "severity", "why", "advice"),
    [
        (unchanged(1), "critical", "backward gave them no gradients", "fully_shard"),
        (unchanged(1, 1, trainable=0), "critical", "all are frozen", "requires_grad_"),
        (unchanged(0), "warning", "No optimizer was stepped in 300 steps", "Call the optimizer's step()"),
        (unchanged(1, state="running", steps=500), "critical", "in 500 steps", "fully_shard"),
    ],
)
def test_a_training_that_changes_no_weights_is_told(
    facts_of_it: JobFacts, severity: str, why: str, advice: str
) -> None:
    found = weights_unchanged(facts_of_it)

    assert (found.kind, found.severity) == ("WEIGHTS_UNCHANGED", severity)
    assert "SGD has changed none of its 4 parameter tensors" in found.summary
    assert why in found.summary
    assert advice in found.next
    assert found.evidence == {"optimizer": "SGD", "parameters": 4, "steps": facts_of_it.steps_made}


@pytest.mark.parametrize(
    "facts_of_it",
    [
        unchanged(0, 1),
        unchanged(1, world_size=2),
        unchanged(1, steps=49),
        unchanged(1, state="running", steps=499),
        unchanged(0, state="running", steps=5000),
    ],
)
def test_weights_of_some_ranks_may_stay(facts_of_it: JobFacts) -> None:
    """As those of a stage that is not trained; or the first update of a job that runs is still to come."""
    assert weights_unchanged(facts_of_it) is None


def test_weights_that_change_later_are_no_finding():
    """The rank reports that, as of a training that was frozen at first."""
    builder = JobFactsBuilder()
    for name in ("SGD", ""):
        builder.info(0, {"kind": "unchanged_weights", "optimizer": name, "parameters": 4, "trainable": 4, "stepped": 1})

    assert weights_unchanged(msgspec.structs.replace(builder.build(), latest=(299,), state="finished")) is None
