"""Ends for lack of memory are told as such, with figures; other ends are not."""

from __future__ import annotations

import numpy as np
import pytest

from tests.diagnosis.memory.memories import growing as growing_bytes
from tests.diagnosis.memory.memories import processes
from traceml.database.schema import HOST, PROCESS, TORCH_MEMORY, Resource
from traceml.diagnosis.deaths.lost_ranks import rank_lost
from traceml.diagnosis.facts.ends import RankExit
from traceml.diagnosis.facts.growing_objects import growing_of
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.memory_growth import MemoryHistory
from traceml.diagnosis.facts.resource_use import ResourceUse
from traceml.diagnosis.facts.trainings.models_and_loaders import LoaderFacts
from traceml.diagnosis.findings import Finding

GIB = 1 << 30
CPU_TEXT = (
    "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
    "to allocate 68719476736 bytes. Error code 12 (Cannot allocate memory)"
)
CUDA_TEXT = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB "
    "of which 1.06 GiB is free. Including non-PyTorch memory, this process has 78.03 GiB memory in use."
)


def growing(rank: int = 1, *, device: bool = False) -> MemoryHistory:
    """Memory that grew by 64 MiB a second for 16 s, up to 2 GiB."""
    history = MemoryHistory()
    rows = np.zeros(17, PROCESS.dtype)
    rows["t_ns"], rows["step"] = np.arange(17) * 10**9, np.arange(17)
    rows["rss_bytes"] = GIB + np.arange(17) * (64 << 20)
    history.process_rows(rank, rows)
    host = np.zeros(1, HOST.dtype)
    host["memory_total_bytes"] = 24 * GIB
    history.host_rows(0, host)
    if device:
        on_device = np.zeros(4, TORCH_MEMORY.dtype)
        on_device["allocated_bytes"], on_device["peak_allocated_bytes"] = 60 * GIB, 71 * GIB
        on_device["total_bytes"] = 80 * GIB
        history.device_rows(rank, on_device)

    return history


def lost(*, device: bool = False, limit: int | None = None, **end: object) -> Finding:
    ended = RankExit(rank=1, open_step=42, open_phase="forward", **end)  # type: ignore[arg-type]
    limits = (ResourceUse(0, Resource.MEMORY, limit - 1, limit),) if limit else ()
    facts = JobFacts(world_size=2, hosts={0: "a", 1: "a"}, exits=(ended,), memory=growing(device=device), limits=limits)
    return rank_lost(facts)


def test_a_kill_by_the_kernel_is_reported_with_growth_and_limit() -> None:
    """Memory at the end, growth per minute, limit, step and phase."""
    finding = lost(state="killed", signal=9, oom="group", limit=2 * GIB)

    assert finding.summary == (
        "Rank 1 was killed by the kernel for lack of memory (SIGKILL), in step 42, in forward; it used 2.00 GiB, "
        "3.75 GiB more each minute, with a limit of 2.00 GiB for its cgroup."
    )
    assert finding.evidence["cause"] == "out_of_memory"
    assert finding.evidence["bytes_per_minute"] == 60 * (64 << 20)
    assert "holds on to memory" in finding.next


KEPT = {
    "path": "losses", "file": "/a/train.py", "function": "main", "line": 41, "kind": "list", "count": 4000,
    "per_step": 1.0, "item_bytes": 200, "holds_graph": True, "of_dataset": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("end", "line", "function"),
    [
        ({"state": "killed", "signal": 9, "oom": "group", "seen": "/a/net.py:7 forward"}, 41, "main"),
        (
            {"state": "failed", "exception": CPU_TEXT, "file": "/a/net.py", "line": 7, "function": "forward"},
            7,
            "forward",
        ),
    ],
)
def test_the_list_that_grew_until_the_end_is_named(end: dict[str, object], line: int, function: str) -> None:
    """With its line, which is the evidence of a kill: an exception has its own."""
    ended = RankExit(rank=1, open_step=42, **end)  # type: ignore[arg-type]
    memory = processes(MemoryHistory(), growing_bytes(), rank=1)
    facts = JobFacts(world_size=2, exits=(ended,), memory=memory, growing={1: growing_of({"grown": [KEPT]})})

    finding = rank_lost(facts)

    assert "the list losses (added to in train.py:41 main) gained 1 element per step" in finding.summary
    assert finding.next.startswith("Add loss.item() or loss.detach() to losses")
    assert (finding.evidence["container"], finding.evidence["line"]) == ("losses", line)
    assert finding.evidence["function"] == function


def test_the_text_of_an_older_torch_has_a_size() -> None:
    """A script may raise or quote one, whose capacity is written another way: that of the sample counts."""
    text = "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 10.76 GiB total capacity)"

    finding = lost(state="failed", exception=text, device=True)

    assert (finding.evidence["requested_bytes"], finding.evidence["limit_bytes"]) == (20 << 20, 80 * GIB)


@pytest.mark.parametrize(("asked", "is_too_large"), [("16.4 TiB", True), ("2.00 GiB", False)])
def test_an_allocation_larger_than_the_host_blames_no_growth(asked: str, is_too_large: bool) -> None:
    """It fails on an empty host, too."""
    text = f"numpy._core._exceptions._ArrayMemoryError: Unable to allocate {asked} for an array with shape (9, 9)"

    finding = lost(state="failed", exception=text, file="/a/train.py", line=5, function="similarity", last_step=41)

    assert ("more each minute" in finding.summary) is ("holds on to memory" in finding.next) is not is_too_large
    assert ("larger than all the memory" in finding.next) is is_too_large


def test_a_list_that_grew_is_not_blamed_for_another_end() -> None:
    """A kill command, and an end for lack of memory of a rank that did not grow."""
    grew = {1: growing_of({"grown": [KEPT]})}
    killed, level = RankExit(rank=1, state="killed", signal=9), processes(MemoryHistory(), [GIB] * 60, rank=1)
    by_kernel = RankExit(rank=1, state="killed", signal=9, oom="group")
    growing_memory = processes(MemoryHistory(), growing_bytes(), rank=1)

    for ended, memory in ((killed, growing_memory), (by_kernel, level)):
        finding = rank_lost(JobFacts(world_size=2, exits=(ended,), memory=memory, growing=grew))
        assert "losses" not in finding.summary + finding.next
        assert "container" not in finding.evidence


@pytest.mark.parametrize("workers", [0, 2])
def test_fewer_loader_workers_are_advised_where_there_are_some(workers: int) -> None:
    """A data set in memory may be all of it."""
    ended = RankExit(rank=0, state="killed", signal=9, oom="group")

    finding = rank_lost(JobFacts(exits=(ended,), loader=LoaderFacts(num_workers=workers)))

    assert ("Use fewer loader workers, a smaller prefetch_factor, batch" in finding.next) is (workers > 0)
    assert "batch or data set in memory, or ask for more memory" in finding.next


def test_a_kill_on_the_host_is_less_certain() -> None:
    """The host's counter may have counted another program's kill."""
    finding = lost(state="killed", signal=9, oom="host")

    assert (
        "was killed (SIGKILL) while the kernel was killing processes of the host for lack of memory" in finding.summary
    )
    assert "the host has 24.0 GiB" in finding.summary


def test_a_kill_command_is_no_lack_of_memory() -> None:
    """No counter has grown, however much memory was in use."""
    finding = lost(state="killed", signal=9)

    assert "was killed by signal 9 (SIGKILL)" in finding.summary
    assert "memory" not in finding.summary
    assert "cause" not in finding.evidence


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (CPU_TEXT, 64 * GIB),
        ("MemoryError: Unable to allocate 7.50 GiB for an array with shape (1006632960,)", int(7.5 * GIB)),
        ("numpy.core._exceptions._ArrayMemoryError: Unable to allocate 512. MiB for an array", 512 << 20),
        ("MemoryError: ", None),
    ],
)
def test_an_allocation_that_failed_is_reported_with_size_and_line(text: str, size: int | None) -> None:
    """torch's allocator, NumPy's, Python's."""
    finding = lost(state="failed", code=1, exception=text, file="train.py", line=17)

    assert "Rank 1 ran out of memory" in finding.summary
    assert "train.py:17, in step 42" in finding.summary
    assert finding.evidence.get("requested_bytes") == size
    assert (finding.evidence["file"], finding.evidence["line"]) == ("train.py", 17)


@pytest.mark.parametrize(("oom", "is_told"), [(None, True), ("group", False)])
def test_a_limit_of_the_address_space_is_told(oom: str | None, is_told: bool) -> None:
    """It makes an allocation fail on a host with much room; the kernel kills for lack of real memory."""
    finding = lost(state="failed", exception="MemoryError", file="a.py", line=3, oom=oom, address_limit_bytes=4 * GIB)

    assert ("with a limit of 4.00 GiB for its address space (ulimit -v)" in finding.summary) == is_told
    assert (finding.evidence["limit_of"] == "address_space") == is_told


def test_a_device_that_is_full_is_reported_with_its_peak() -> None:
    """What was asked for, what was allocated, what the device has."""
    finding = lost(state="failed", code=1, exception=CUDA_TEXT, file="train.py", line=17, device=True)

    assert finding.summary == (
        "Rank 1 ran out of device memory: an allocation of 2.00 GiB failed at train.py:17, in step 42, in forward; "
        "it used 78.0 GiB of device memory; the device has 79.1 GiB."
    )
    assert (finding.evidence["peak_bytes"], finding.evidence["requested_bytes"]) == (71 * GIB, 2 * GIB)
    assert "smaller batch" in finding.next


@pytest.mark.parametrize("text", ["ValueError: the memory is fine", "RuntimeError: shape '[2]' is invalid", ""])
def test_other_exceptions_are_not_about_memory(text: str) -> None:
    """A word is no cause."""
    finding = lost(state="failed", code=1, exception=text, file="train.py", line=17)

    assert "ran out" not in finding.summary
    assert "cause" not in finding.evidence
