"""Resources near their limit, and those that only look so."""

from __future__ import annotations

import numpy as np
import pytest

from tests.diagnosis.fabricated import Job, window_of
from traceml.database.schema import LIMITS, Resource
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.resource_use import ResourceUse, UseHistory
from traceml.diagnosis.facts.trainings.models_and_loaders import LoaderFacts
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.rules.near_limits import limits_near
from traceml.diagnosis.ruleset import diagnose

FOLDERS = {0: "/data/run"}


def found(resource: Resource, used: list[int], limit: int, *, seconds=1.0, steps: int = 10, rank: int = 0):
    """Return the findings about samples that are `seconds` and `steps` apart, or at these seconds."""
    rows = np.zeros(len(used), LIMITS.dtype)
    at_s = np.arange(len(used)) * seconds if isinstance(seconds, float) else seconds
    rows["t_ns"], rows["step"] = at_s * 1e9, np.arange(len(used)) * steps
    rows["resource"], rows["used"], rows["limit"] = resource, used, limit
    history = UseHistory()
    for part in np.array_split(rows, 3):
        history.add(rank, part)

    findings = diagnose(window_of(Job(ranks=1, grouped=False)), JobFacts(limits=history.uses(), save_folders=FOLDERS))
    return [finding for finding in findings if finding.kind is Kind.LIMIT_NEAR]


def test_a_leak_of_open_files_is_reported_with_the_time_left():
    """One more descriptor in each step: 20 steps are left."""
    (finding,) = found(Resource.OPEN_FILES, list(range(196, 237, 5)), 256, seconds=5.0, steps=5, rank=3)

    assert finding.ranks == (3,)
    assert finding.severity == "critical"
    assert finding.evidence["left_steps"] == pytest.approx(20)
    assert finding.evidence["left_s"] == pytest.approx(20)
    assert "236 of 256 open files" in finding.summary
    assert "20 steps" in finding.summary


def test_cpu_time_that_is_used_up_names_the_rank():
    """A login host allows half an hour: 10 minutes are left at 2 seconds of it per second."""
    (finding,) = found(Resource.CPU_TIME, list(range(400, 602, 20)), 1800, seconds=10.0, rank=1)

    assert finding.ranks == (1,)
    assert finding.evidence["left_s"] == pytest.approx(600)
    assert "600 of 1,800 seconds of CPU time (ulimit -t) in use on rank 1" in finding.summary
    assert finding.headline == "CPU time: 33 % of the limit in use"


@pytest.mark.parametrize(
    ("resource", "used", "limit"),
    [
        (Resource.OPEN_FILES, [30] * 9, 1024),
        (Resource.OPEN_FILES, [30, 300, 40, 310, 35, 305, 30, 300, 40], 1024),  # opened and closed
        (Resource.OPEN_FILES, [30, 60, 90, 120], 1024),  # the start, of too few samples
        (Resource.DISK, [970] * 9, 1000),  # full, as disks are
        (Resource.CHECKPOINT_DISK, [970] * 9, 1000),
        (Resource.DISK, list(range(100, 190, 10)), 10_000_000),  # it grows, and lasts for years
        (Resource.CPU_QUOTA, [0, 1, 2, 3, 3, 4, 5, 5, 6], 100),
        (Resource.CPU_QUOTA, [9] * 9, 10),  # of too few periods
    ],
)
def test_what_does_not_run_out_is_no_finding(resource, used, limit):
    """Level use, use that comes and goes, a disk that is full and stays so."""
    assert found(resource, used, limit) == []


@pytest.mark.parametrize(
    ("resource", "used", "limit", "words"),
    [
        (Resource.SHARED_MEMORY, [60 << 20] * 3, 64 << 20, "60.0 MiB of 64.0 MiB shared memory"),
        (Resource.DISK, [n << 30 for n in range(80, 98, 2)], 100 << 30, "96.0 GiB of 100 GiB disk"),
        (
            Resource.CHECKPOINT_DISK,
            [n << 30 for n in range(80, 98, 2)],
            100 << 30,
            "96.0 GiB of 100 GiB disk of the checkpoints in /data/run",
        ),
        (Resource.CPU_QUOTA, [40] * 3, 100, "40 % of its scheduling periods"),
        (Resource.PROCESSES, [950] * 3, 1000, "950 of 1,000 processes"),
    ],
)
def test_each_resource_has_its_sentence(resource, used, limit, words):
    """In its unit, with advice."""
    (finding,) = found(resource, used, limit)

    assert words in finding.summary
    assert finding.next
    assert finding.ranks == ()


def test_a_resource_of_a_newer_version_is_ignored():
    """Its number has no name here."""
    rows = np.zeros(1, LIMITS.dtype)
    rows["resource"] = 77
    history = UseHistory()
    history.add(0, rows)

    assert history.uses() == ()


def test_what_ends_first_is_told_with_its_host():
    """A larger share that lasts does not hide a host whose memory is full in two minutes."""
    uses = (ResourceUse(0, Resource.MEMORY, 58, 64), ResourceUse(8, Resource.MEMORY, 40, 64, left_s=120.0))

    (finding,) = limits_near(JobFacts(limits=uses, hosts={0: "node0", 8: "node1"}))

    assert (finding.severity, finding.evidence["host"]) == ("critical", "node1")
    assert "memory of the container of node1 in use, and it grows" in finding.summary


def test_memory_that_the_start_takes_is_not_growing():
    """Imports and the model take 800 MiB in 8 s; from the first steps on the use is level."""
    used = [n << 20 for n in (*range(100, 900, 100), *[800] * 4)]

    assert found(Resource.MEMORY, used, 2 << 30, steps=1) == []
    assert found(Resource.MEMORY, used[:8], 2 << 30, steps=10) != []


@pytest.mark.parametrize("resource", [Resource.OPEN_FILES, Resource.PROCESSES])
def test_what_the_start_opens_is_not_growing(resource: Resource):
    """Libraries open files, and start threads, up to the first steps; `ulimit -n` is 64."""
    used = [12, 13, 15, 16, 17, 18, 19, 20, 20, 20, 20, 20, 20, 20]

    assert found(resource, used, 64, steps=2) == []
    assert found(resource, used[:8], 64, steps=10) != []


def test_growth_that_has_ended_is_no_finding():
    """A data set is cached in 10 minutes; 5 minutes later its use has many rows of growth, and one a minute since."""
    seconds = np.concatenate([np.arange(0, 600, 20), np.arange(600, 901, 60)])
    used = np.minimum(20 + seconds / 20, 50).astype(np.int64) << 30

    assert found(Resource.MEMORY, used, 64 << 30, seconds=seconds, steps=20) == []
    assert found(Resource.MEMORY, used[:30], 64 << 30, seconds=seconds[:30], steps=20) != []


@pytest.mark.parametrize("resource", [Resource.SHARED_MEMORY, Resource.PROCESSES])
@pytest.mark.parametrize("workers", [0, 4])
def test_loader_workers_are_told_of_where_there_are_some(resource: Resource, workers: int) -> None:
    """Other programs, and those that were killed, leave files in /dev/shm, too."""
    facts = JobFacts(limits=(ResourceUse(0, resource, 95, 100),), loader=LoaderFacts(num_workers=workers))

    (finding,) = limits_near(facts)

    assert ("workers" in finding.next) is (workers > 0)


@pytest.mark.parametrize("resource", [Resource.OPEN_FILES, Resource.MEMORY])
@pytest.mark.parametrize("left_s", [None, 600.0])
def test_growth_is_looked_for_where_there_is_some(resource: Resource, left_s: float | None) -> None:
    (finding,) = limits_near(JobFacts(limits=(ResourceUse(0, resource, 95, 100, left_s=left_s),)))

    assert finding.next.startswith("Find what ") is (left_s is not None)
