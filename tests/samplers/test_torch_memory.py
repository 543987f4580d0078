"""Samples of a fake torch's allocator: the machine may have no device."""

from __future__ import annotations

from types import SimpleNamespace

from traceml.samplers.sampler_selection import open_samplers
from traceml.samplers.torch_memory import SegmentWatch, TorchMemorySampler


def test_nothing_before_the_script_initialised_cuda() -> None:
    """Neither an absent torch nor an unused CUDA gives rows, or is touched."""
    unused = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: False))

    assert list(TorchMemorySampler({}).sample(1, 2)) == []
    assert list(TorchMemorySampler({"torch": unused}).sample(1, 2)) == []
    assert list(TorchMemorySampler({"torch": SimpleNamespace()}).sample(1, 2)) == []


def test_a_row_per_device_in_use() -> None:
    """Devices on which this rank has allocated nothing are left out."""
    figures = {
        0: {},
        1: {
            "allocated_bytes.all.current": 5,
            "reserved_bytes.all.current": 20,
            "allocated_bytes.all.peak": 9,
            "num_alloc_retries": 3,
        },
    }
    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        device_count=lambda: 2,
        memory_stats=figures.__getitem__,
        get_device_properties=lambda _device: SimpleNamespace(total_memory=80),
    )

    rows = list(TorchMemorySampler({"torch": SimpleNamespace(cuda=cuda)}).sample(1, 2))
    cuda.host_memory_stats_as_nested_dict = lambda: {"active_bytes": {"current": 7}}
    (newer,) = TorchMemorySampler({"torch": SimpleNamespace(cuda=cuda)}).sample(1, 2)

    assert rows == [(1, 2, 1, 5, 20, 9, 80, 3, -1)]
    assert newer[-1] == 7


def test_devices_of_other_ranks_are_seldom_read() -> None:
    """A rank sees all devices of its host, and has allocations on one."""
    reads: list[int] = []

    def memory_stats(device: int) -> dict[str, int]:
        reads.append(device)
        return {"reserved_bytes.all.current": 20 if device == 1 else 0}

    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        device_count=lambda: 3,
        memory_stats=memory_stats,
        get_device_properties=lambda _device: SimpleNamespace(total_memory=80),
    )
    sampler = TorchMemorySampler({"torch": SimpleNamespace(cuda=cuda)})

    rows = [row[2] for number in range(20) for row in sampler.sample(number, number)]

    assert rows == [1] * 20
    assert sorted(reads) == [0] * 2 + [1] * 20 + [2] * 2


def test_what_a_host_shares_is_sampled_once() -> None:
    """Only local rank 0 opens the host's samplers."""
    first, second = open_samplers(local_rank=0), open_samplers(local_rank=1)

    assert {"process", "host", "torch_memory"} <= {sampler.name for sampler in first}
    assert {sampler.name for sampler in second} == {"process", "torch_memory", "limits", "loader_workers"}
    for sampler in (*first, *second):
        sampler.close()


def test_memory_that_goes_back_and_forth_is_noted() -> None:
    """From a sample in a step on, after 5 s and then ever more rarely; not while torch only requests more."""
    rows: list[dict[str, int]] = []
    watch = SegmentWatch(lambda kind, **row: rows.append(row) if kind == "segments" else None)

    def take(second: int, step: int, requested: int, given_back: int) -> None:
        figures = {"segment.all.allocated": requested, "segment.all.freed": given_back}
        watch.take(second * 10**9, step, 0, figures)

    take(0, -1, 50, 40)
    take(1, 0, 100, 0)
    take(2, 10, 900, 800)
    take(6, 50, 600, 500)
    take(12, 110, 700, 500)
    for second in range(13, 200):
        take(second, second * 10, 700 + second, 500 + second)

    assert rows[0] == {"device": 0, "from_step": 0, "step": 50, "requested": 500, "given_back": 500}
    assert rows[1]["from_step"] == 110
    assert len(rows) < 16
    assert rows[-1]["requested"] == rows[-1]["given_back"] > 0


def test_a_sample_takes_the_allocators_counters() -> None:
    """Those of each device in use."""
    rows: list[dict[str, int]] = []
    counters = iter([(10, 0), (30, 20)])

    def stats(_device: int) -> dict[str, int]:
        requested, given_back = next(counters)
        peak = {"allocated_bytes.all.peak": 9}
        return peak | {"segment.all.allocated": requested, "segment.all.freed": given_back}

    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        device_count=lambda: 1,
        memory_stats=stats,
        get_device_properties=lambda _device: SimpleNamespace(total_memory=80),
    )
    modules = {"torch": SimpleNamespace(cuda=cuda)}
    sampler = TorchMemorySampler(modules, lambda kind, **row: rows.append({"kind": kind, **row}))
    for t_ns, step in ((0, 3), (6 * 10**9, 13)):
        assert len(list(sampler.sample(t_ns, step))) == 1

    assert rows == [{"kind": "segments", "device": 0, "from_step": 3, "step": 13, "requested": 20, "given_back": 20}]
