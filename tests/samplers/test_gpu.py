"""GPU samples with a fake driver: units, missing figures, lost devices."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from traceml.database.schema import GPU
from traceml.samplers.gpu import GpuSampler
from traceml.samplers.nvml import Nvml, NvmlError


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

    def nvmlDeviceGetUtilizationRates(self, handle: Any, out: Any) -> int:
        out._obj.gpu = 87
        return self._status("utilization", handle)

    def nvmlDeviceGetMemoryInfo(self, handle: Any, out: Any) -> int:
        out._obj.total, out._obj.used = 80 << 30, 3 << 30
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

    assert rows[0] == (9, 0, 87.0, 3 << 30, 80 << 30, 61.0, 345.6, 1980, 0x20)
    assert [row[1] for row in rows] == [0, 1]
    assert len(rows[0]) == len(GPU.columns)
    GPU.struct.pack(*rows[0])


def test_what_a_device_does_not_offer_is_minus_one() -> None:
    """A missing figure leaves the others as they are."""
    (row,) = GpuSampler(Nvml(Driver(dumb=("utilization", "power"), count=1))).sample(9, 0)

    assert row == (9, 0, -1, 3 << 30, 80 << 30, 61.0, -1, 1980, 0x20)
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
