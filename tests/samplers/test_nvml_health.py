"""Faults of devices with a fake driver: counters, events, and drivers that lack them."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

from tests.samplers.test_gpu import Driver
from traceml.samplers.gpu import GpuSampler
from traceml.samplers.nvml import Nvml
from traceml.samplers.nvml_health import DeviceHealth, HealthWatch, NvmlHealth

S = 10**9


class FaultyDriver(Driver):
    """A fake libnvidia-ml whose devices report faults."""

    def __init__(self) -> None:
        super().__init__()
        self.errors, self.pending = 0, 0
        self.events: list[tuple[int, int]] = []
        self.sets = 0

    def nvmlEventSetCreate(self, out: Any) -> int:
        out._obj.value, self.sets = 900, self.sets + 1
        return 0

    def nvmlDeviceRegisterEvents(self, handle: Any, kinds: ctypes.c_ulonglong, events: Any) -> int:
        return 0 if (kinds.value, events.value) == (8, 900) else 3

    def nvmlEventSetWait_v2(self, events: Any, out: Any, timeout: ctypes.c_uint) -> int:
        assert timeout.value == 0  # the recorder's thread does not wait
        if not self.events:
            return 10  # a timeout

        index, xid = self.events.pop(0)
        out._obj.device, out._obj.type, out._obj.data = index + 100, 8, xid
        return 0

    def nvmlEventSetFree(self, events: Any) -> int:
        self.sets -= 1
        return 0

    def nvmlDeviceGetTotalEccErrors(self, handle: Any, kind: Any, counter: Any, out: Any) -> int:
        assert (kind.value, counter.value) == (1, 0)
        out._obj.value = self.errors
        return 0

    def nvmlDeviceGetRemappedRows(self, handle: Any, *counts: Any) -> int:
        _, _, pending, _ = counts
        pending._obj.value = self.pending
        return 0

    def nvmlDeviceGetMaxClockInfo(self, handle: Any, kind: Any, out: Any) -> int:
        out._obj.value = 1980
        return 0

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: Any, out: Any) -> int:
        out._obj.value = 400_000
        return 0

    def nvmlDeviceGetPowerManagementDefaultLimit(self, handle: Any, out: Any) -> int:
        out._obj.value = 700_000
        return 0


def test_counters_are_noted_when_they_change_and_events_once() -> None:
    """Each five seconds; nothing while nothing happens."""
    rows: list[dict[str, Any]] = []
    driver = FaultyDriver()
    sampler = GpuSampler(Nvml(driver), lambda kind, **row: rows.append({"kind": kind, **row}))
    assert len(list(sampler.sample(0, 1))) == 2

    sound = {"kind": "gpu_health", "step": 1, "ecc_errors": 0, "remap_pending": 0, "remap_failed": 0}
    limits = {"max_clock_mhz": 1980, "power_limit_w": 400, "default_power_limit_w": 700}
    assert rows == [{**sound, "index": index, **limits} for index in (0, 1)]

    rows.clear()
    for second in range(1, 12):
        list(sampler.sample(second * S, second))

    assert rows == []
    driver.errors, driver.events = 2, [(1, 79)]
    list(sampler.sample(20 * S, 57))
    assert rows[0] == {"kind": "gpu_health", "index": 1, "xid": 79, "step": 57}
    assert [(row["index"], row["ecc_errors"]) for row in rows[1:]] == [(0, 2), (1, 2)]

    sampler.close()
    assert driver.sets == 0


def test_the_nvlink_domain_is_noted_once_it_is_known() -> None:
    """The fabric manager may still be at work when the job begins; a host of its own is in no domain."""
    rows: list[dict[str, Any]] = []
    driver = FaultyDriver()
    state = {"state": 2, "cluster": bytes(range(16))}

    def fabric(_handle: Any, out: Any) -> int:
        out._obj.state, out._obj.clique = state["state"], 7
        ctypes.memmove(out._obj.cluster, state["cluster"], 16)
        return 0

    driver.nvmlDeviceGetGpuFabricInfo = fabric  # type: ignore[attr-defined]
    sampler = GpuSampler(Nvml(driver), lambda kind, **row: rows.append({"kind": kind, **row}))
    list(sampler.sample(0, 1))
    state["state"] = 3
    state["cluster"] = bytes(16)
    list(sampler.sample(10 * S, 2))
    assert [row for row in rows if row["kind"] == "nvlink"] == []

    state["cluster"] = bytes(range(16))
    for second in (20, 30):
        list(sampler.sample(second * S, second))

    assert [row for row in rows if row["kind"] == "nvlink"] == [
        {"kind": "nvlink", "domain": "000102030405060708090a0b0c0d0e0f.7"}
    ]


def test_a_driver_without_these_calls_is_silent() -> None:
    """An older one, or a device that offers none."""
    rows: list[object] = []
    nvml = Nvml(Driver())
    health = NvmlHealth(nvml.library, nvml.devices())
    watch = HealthWatch(health, lambda *row, **_: rows.append(row))
    watch.check(0, 1, nvml.devices())
    watch.close()

    assert rows == []
    assert health.read(nvml.devices()[0]) == DeviceHealth()


def test_events_that_cannot_be_watched_leave_the_counters() -> None:
    """A container may not allow them."""
    driver = FaultyDriver()
    refusing = SimpleNamespace(
        nvmlEventSetCreate=lambda _out: 4, nvmlDeviceGetTotalEccErrors=driver.nvmlDeviceGetTotalEccErrors
    )
    health = NvmlHealth(refusing, [])

    assert list(health.xids()) == []
    assert health.read(Nvml(driver).devices()[0]).ecc_errors == 0
