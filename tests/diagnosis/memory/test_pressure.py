"""Memory that is nearly full or uneven, and what only looks so."""

from __future__ import annotations

import numpy as np
import pytest

from tests.diagnosis.fabricated import Job, window_of
from tests.diagnosis.memory.memories import GB, device, full_device, full_host, host, processes, uneven_devices
from traceml.database.schema import PROCESS, Resource
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.memory_growth import MemoryHistory
from traceml.diagnosis.facts.resource_use import ResourceUse
from traceml.diagnosis.facts.trainings.models_and_loaders import LoaderFacts
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.ruleset import diagnose

MEMORY = ("MEMORY_PRESSURE", "MEMORY_IMBALANCE")


def found(ranks: int = 1, **facts) -> list[Finding]:
    findings = diagnose(window_of(Job(ranks=ranks, grouped=ranks > 1)), JobFacts(world_size=ranks, **facts))
    return [finding for finding in findings if finding.kind in MEMORY]


def test_a_host_that_is_nearly_full_is_reported_with_what_the_ranks_hold():
    """15 of 16 GB, 9 of them in the training process."""
    (finding,) = found(**full_host())

    assert finding.severity == "warning"
    assert finding.headline == "The host's memory is nearly full: 94 % in use"
    assert "the training processes hold 9.00 GiB" in finding.summary


@pytest.mark.parametrize(
    ("workers", "own", "says"),
    [
        (2, 2 * GB, "Use fewer loader workers, a smaller prefetch_factor or data set in memory, or a host"),
        (0, 9 * GB, "Use a smaller data set in memory, or a host with more memory"),
        (0, 2 * GB, "Look at what else holds it (other processes, which `top` names, or files in /dev/shm), or use"),
    ],
)
def test_nobody_without_loader_workers_is_told_to_use_fewer(workers: int, own: int, says: str) -> None:
    """Also of another loader than the training's."""
    memory = host(processes(MemoryHistory(), [own] * 60), 15 * GB)

    (finding,) = found(memory=memory, loaders={0: [LoaderFacts(num_workers=0), LoaderFacts(num_workers=workers)]})

    assert finding.next.startswith(says)


def test_the_limit_of_a_container_is_reported_once():
    """Its memory is a limit of its own kind."""
    assert found(**full_host(), limits=(ResourceUse(0, Resource.MEMORY, 95, 100),)) == []


def test_a_host_with_room_and_a_passing_peak_are_no_pressure():
    """All recent samples must be high."""
    peak = host(host(MemoryHistory(), 8 * GB), 15 * GB)
    assert [found(memory=host(MemoryHistory(), 14 * GB)), found(memory=peak) != []] == [[], True]

    peak.host_rows(0, host(MemoryHistory(), 8 * GB)._hosts[0][:1])
    assert found(memory=peak) == []


def test_a_device_that_was_full_is_reported_with_its_retries():
    """The peak counts, and allocations that had to free the cache."""
    (finding,) = found(memory=full_device())

    assert finding.headline == "Device memory is short: torch freed its cache for 12 allocations, tensors took 98 %"
    assert "12 allocations succeeded only after torch had freed its cache" in finding.summary
    assert "smaller batch" in finding.next
    assert found(memory=device(MemoryHistory(), [70 * GB] * 9)) == []
    (finding,) = found(memory=device(MemoryHistory(), [75 * GB] * 9))
    assert finding.headline == "The device's memory is nearly full: up to 94 % in use"


@pytest.mark.parametrize(("autocast", "advised"), [(False, True), (True, False)])
def test_who_computes_in_16_bits_is_not_told_to(autocast: bool, advised: bool) -> None:
    """Activations take half of the memory already."""
    (finding,) = found(memory=full_device(), autocast=autocast)

    assert ("or a lower precision" in finding.next) is advised
    assert "activation checkpointing" in finding.next


def test_a_device_that_tensors_do_not_fill_is_filled_by_others():
    """Another program, or fragments: a smaller batch is no advice. It tells how many ranks lack memory."""
    history = MemoryHistory()
    for rank, retries in enumerate((40, 6, 0)):
        device(history, [10 * GB] * 9, rank=rank, retries=retries)

    (finding,) = found(3, memory=history)

    assert finding.headline == "Device memory is short: torch freed its cache for 40 allocations, tensors took 12 %"
    assert finding.summary.startswith("Tensors took up to 10.0 GiB of the 80.0 GiB of the device of rank 0 (12 %).")
    assert finding.summary.endswith("time. 2 of 3 ranks are short of device memory.")
    assert finding.next.startswith("Tensors leave room on the device: look for other programs")


def test_a_full_host_is_told_beside_the_limit_of_another_one():
    """With the number of full hosts; resident memory that counts mapped files several times is not told.

    Ranks of two launchers on one host both tell of its memory.
    """
    history = MemoryHistory()
    for rank in range(4):
        host(processes(history, [17 * GB] * 60, rank=rank), 15 * GB, rank=rank)

    limits = (ResourceUse(2, Resource.MEMORY, 95, 100),)
    (finding,) = found(4, memory=history, limits=limits, hosts={0: "a", 1: "b", 2: "c", 3: "b"})

    assert finding.summary == (
        "The memory of a is nearly full: 15.0 GiB of 16.0 GiB are in use (94 %). The memory of 1 other host is nearly "
        "full, too."
    )


def test_a_rank_that_needs_far_more_than_the_others_is_named():
    """A warning where its device is nearly full, else a remark."""
    (finding,) = found(4, memory=uneven_devices())
    history = MemoryHistory()
    for rank, size in enumerate((30, 10, 11, 10)):
        device(history, [size * GB] * 9, rank=rank)

    (remark,) = found(4, memory=history)

    assert (finding.ranks, finding.severity) == ((0,), "warning")
    assert remark.severity == "info"
    assert diagnose(window_of(Job(ranks=4)), JobFacts(world_size=4, memory=history))[0].kind not in MEMORY


def test_what_a_rank_held_in_training_counts():
    """At its end a script drops it, and the newest sample is of that time."""
    history = host(MemoryHistory(), 8 * GB)
    for rank in range(2):
        rows = np.zeros(41, PROCESS.dtype)
        rows["step"], rows["t_ns"] = np.minimum(np.arange(41), 39), np.arange(41) * 1e9
        rows["rss_bytes"] = [*[(1 if rank else 6) * GB] * 40, GB]
        history.process_rows(rank, rows)

    (finding,) = found(2, memory=history)

    assert (finding.kind, finding.ranks) == ("MEMORY_IMBALANCE", (0,))
    assert finding.evidence["most_bytes"] == 6 * GB


def test_ranks_with_nearly_equal_needs_are_not_compared():
    """Neither a small difference, nor a large ratio of little memory, nor a single rank."""
    near, little = MemoryHistory(), host(MemoryHistory(), 4 * GB, 64 * GB)
    for rank in range(4):
        device(near, [(12 if rank else 14) * GB] * 9, rank=rank)
        processes(little, [(1 if rank else 3) * GB] * 60, rank=rank)

    assert found(4, memory=near) == []
    assert found(4, memory=little) == []
    assert found(memory=device(MemoryHistory(), [70 * GB] * 9)) == []
