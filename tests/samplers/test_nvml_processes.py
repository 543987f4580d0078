"""Use of devices by other programs, with a fake driver and real processes."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from traceml.samplers.nvml import NvmlDevice
from traceml.samplers.nvml_processes import DeviceSharing

GPU_0 = NvmlDevice(0, ctypes.c_void_p(100))
NO_SUCH = 4_194_305  # above the kernel's largest number of a process


class Driver:
    """A fake libnvidia-ml: `use` is what each process has of a device since, `status` the answer."""

    def __init__(self, *use: tuple[int, int], status: int = 0) -> None:
        self.use, self.status, self.asked_since = list(use), status, list[int]()

    def nvmlDeviceGetProcessUtilization(self, handle: Any, samples: Any, count: Any, since: Any) -> int:
        assert count._obj.value >= len(self.use)
        self.asked_since.append(since.value)
        count._obj.value = len(self.use)
        for number, (pid, pct) in enumerate(self.use):
            samples[number].pid, samples[number].sm_pct, samples[number].t_us = pid, pct, 1000 + number

        return self.status


def others(driver: Any) -> float:
    """Return the share of others after a first call, which is of before the run."""
    sharing = DeviceSharing(driver)
    assert sharing.others_pct(GPU_0) == -1
    return sharing.others_pct(GPU_0)


@pytest.fixture
def child() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.kill()


def test_kernels_of_other_programs_are_added_up() -> None:
    """The mean of each program's samples; each call asks for those since the last one."""
    driver = Driver((os.getpid(), 60), (NO_SUCH, 30), (NO_SUCH, 10), (NO_SUCH + 1, 5))

    assert others(driver) == 25.0
    assert driver.asked_since == [0, 1003]


@pytest.mark.process
def test_own_processes_are_not_others(child: int) -> None:
    """A loader's worker that computes on the device, for example."""
    assert others(Driver((os.getpid(), 60), (child, 30))) == 0.0


def test_the_number_of_a_process_may_be_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An own process that has ended is known from the last reading; what computes later with its number is not it."""
    driver = Driver((os.getpid(), 60), (NO_SUCH, 30))
    sharing = DeviceSharing(driver)
    with monkeypatch.context() as patch:
        patch.setattr(sharing, "_descends", lambda pid: True)
        sharing.others_pct(GPU_0)

    assert sharing.others_pct(GPU_0) == 0.0
    driver.use = driver.use[:1]
    assert sharing.others_pct(GPU_0) == 0.0
    driver.use = [(os.getpid(), 60), (NO_SUCH, 30)]
    assert sharing.others_pct(GPU_0) == 30.0


def test_without_kernels_nobody_computes() -> None:
    """Between two phases of a script, for example: the driver then has no samples."""
    driver = Driver((os.getpid(), 60))
    sharing = DeviceSharing(driver)
    sharing.others_pct(GPU_0)
    driver.use, driver.status = [], 6

    assert sharing.others_pct(GPU_0) == 0.0


@pytest.mark.parametrize(
    "driver",
    [Driver((NO_SUCH, 90)), Driver((os.getpid(), 60), status=3), object()],
    ids=["numbers of another namespace", "not supported", "an old driver"],
)
def test_what_cannot_be_told_apart_is_not_known(driver: Any) -> None:
    """Where this process is not among those of the driver, all would be others."""
    assert others(driver) == -1


def test_a_part_of_a_device_is_not_known() -> None:
    """The driver counts for the whole GPU."""
    sharing = DeviceSharing(Driver((os.getpid(), 60)))
    part = NvmlDevice(0, ctypes.c_void_p(100), ctypes.c_void_p(501))

    assert [sharing.others_pct(part) for _ in range(2)] == [-1, -1]
