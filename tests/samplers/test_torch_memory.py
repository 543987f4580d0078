"""Samples of a fake torch's allocator: the machine may have no device."""

from __future__ import annotations

from types import SimpleNamespace

from traceml.samplers.available import open_samplers
from traceml.samplers.torch_memory import TorchMemorySampler


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


def test_what_a_host_shares_is_sampled_once() -> None:
    """Only local rank 0 opens the host's samplers."""
    first, second = open_samplers(local_rank=0), open_samplers(local_rank=1)

    assert {"process", "host", "torch_memory"} <= {sampler.name for sampler in first}
    assert {sampler.name for sampler in second} == {"process", "torch_memory", "limits", "loader_workers"}
    for sampler in (*first, *second):
        sampler.close()
