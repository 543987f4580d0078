"""GPU samples with a fake driver: units, missing figures, lost devices."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from traceml.database.schema import GPU
from traceml.samplers.gpu import GpuSampler
from traceml.samplers.nvidia_driver import has_own_gpus
from traceml.samplers.nvml import Nvml, NvmlError

MIG = "MIG-8c4f9b2e-1111-2222-3333-444444444444"


@pytest.fixture(autouse=True)
def _all_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


class Driver:
    """A fake libnvidia-ml with two devices; calls of `lost` ones fail, and `dumb` calls are not supported."""

    def __init__(self, lost: tuple[int, ...] = (), dumb: tuple[str, ...] = (), count: int = 2) -> None:
        self.lost, self.dumb, self.count, self.open = lost, dumb, count, False

    def nvmlInit_v2(self) -> int:
        self.open = True
        return 0

    def nvmlShutdown(self) -> int:
        self.open = False
        return 0

    def nvmlDeviceGetCount_v2(self, out: Any) -> int:
        out._obj.value = self.count
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: ctypes.c_uint, out: Any) -> int:
        out._obj.value = index.value + 100
        return 0

    def nvmlDeviceGetUUID(self, handle: Any, out: Any, size: ctypes.c_uint) -> int:
        out.value = f"GPU-{handle.value - 100:x}{'0' * 7}-1111-2222-3333-444444444444".encode()
        return 0

    def nvmlDeviceGetHandleByUUID(self, name: bytes, out: Any) -> int:
        out._obj.value = 501
        return 0 if name == MIG.encode() else 6

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, mig: Any, out: Any) -> int:
        out._obj.value = mig.value - 400
        return 0

    def nvmlDeviceGetIndex(self, handle: Any, out: Any) -> int:
        out._obj.value = handle.value - 100
        return 0

    def nvmlDeviceGetUtilizationRates(self, handle: Any, out: Any) -> int:
        out._obj.gpu = 87
        return self._status("utilization", handle)

    def nvmlDeviceGetMemoryInfo(self, handle: Any, out: Any) -> int:
        is_mig = handle.value == 501
        out._obj.total, out._obj.used = (10 << 30, 1 << 30) if is_mig else (80 << 30, 3 << 30)
        return self._status("memory", handle)

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: Any, out: Any) -> int:
        out._obj.value = 61
        return self._status("temperature", handle)

    def nvmlDeviceGetPowerUsage(self, handle: Any, out: Any) -> int:
        out._obj.value = 345_600
        return self._status("power", handle)

    def nvmlDeviceGetClockInfo(self, handle: Any, kind: ctypes.c_uint, out: Any) -> int:
        out._obj.value = {1: 1980}[kind.value]
        return self._status("clock", handle)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Any, out: Any) -> int:
        out._obj.value = 0x20
        return self._status("reasons", handle)

    def _status(self, call: str, handle: Any) -> int:
        return 15 if handle.value - 100 in self.lost else 3 if call in self.dumb else 0


def test_figures_have_the_tables_units() -> None:
    """Percent, bytes, degrees, watts, megahertz, in the order of the columns, a row per device."""
    rows = list(GpuSampler(Nvml(Driver())).sample(9, 0))

    assert rows[0] == (9, 0, 87.0, 3 << 30, 80 << 30, 61.0, 345.6, 1980, 0x20, -1)
    assert [row[1] for row in rows] == [0, 1]
    assert len(rows[0]) == len(GPU.columns)
    GPU.struct.pack(*rows[0])


def test_what_a_device_does_not_offer_is_minus_one() -> None:
    """A missing figure leaves the others as they are."""
    (row,) = GpuSampler(Nvml(Driver(dumb=("utilization", "power"), count=1))).sample(9, 0)

    assert row == (9, 0, -1, 3 << 30, 80 << 30, 61.0, -1, 1980, 0x20, -1)
    GPU.struct.pack(*row)


def test_a_lost_device_does_not_hide_the_others() -> None:
    """Rows of the other devices come first, then the error."""
    rows: list[tuple[float, ...]] = []
    with pytest.raises(NvmlError, match="device 0 does not respond"):
        rows.extend(GpuSampler(Nvml(Driver(lost=(0,)))).sample(9, 0))

    assert [row[1] for row in rows] == [1]


def test_no_device_means_no_sampler() -> None:
    """A driver without devices is released."""
    driver = Driver(count=0)

    with pytest.raises(NvmlError, match="no device"):
        GpuSampler(Nvml(driver))

    assert not driver.open


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        ("1", [1]),
        ("2, 0", [2, 0]),
        ("GPU-1", [1]),
        ("GPU-20000000-1111-2222-3333-444444444444,GPU-0", [2, 0]),
        ("0,7,1", [0]),  # CUDA ends the list there
        ("1,-1,0", [1]),
        (MIG, [1]),
    ],
)
def test_only_visible_devices_are_sampled(monkeypatch: pytest.MonkeyPatch, visible: str, indices: list[int]) -> None:
    """By index, UUID or its beginning, as CUDA reads the variable; other GPUs may be another user's."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    assert [row[1] for row in GpuSampler(Nvml(Driver(count=3))).sample(9, 0)] == indices


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles", "0,0", "GPU-9", "MIG-unknown"])
def test_without_a_visible_device_there_is_no_sampler(monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    """A job that was told to use no GPU has no figures of other jobs' GPUs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    driver = Driver()

    with pytest.raises(NvmlError, match="none is visible"):
        GpuSampler(Nvml(driver))

    assert not driver.open


def test_a_mig_device_has_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Temperature, power and clock are those of its GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", MIG)

    (row,) = GpuSampler(Nvml(Driver())).sample(9, 0)

    assert row == (9, 1, 87.0, 1 << 30, 10 << 30, 61.0, 345.6, 1980, 0x20, -1)


def test_a_script_may_choose_devices_until_cuda_is_initialized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Afterwards CUDA ignores the variable, which may be meant for children."""
    cuda = SimpleNamespace(is_initialized=lambda: False)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    sampler = GpuSampler(Nvml(Driver()))

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [row[1] for row in sampler.sample(9, 0)] == [1]

    cuda.is_initialized = lambda: True
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [row[1] for row in sampler.sample(9, 0)] == [1]


@pytest.mark.parametrize(
    ("local_rank", "visible", "own"),
    [(1, None, False), (1, "0,1", False), (1, "1", True), (3, "GPU-4,GPU-5", True), (1, "", False)],
)
def test_a_rank_with_gpus_of_its_own_samples_them(local_rank: int, visible: str | None, own: bool) -> None:
    """Slurm and Ray may show each rank only its own; else local rank 0 sees all."""
    assert has_own_gpus(local_rank, visible) is own
