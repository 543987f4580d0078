"""Use of a device by the programs of others, where NVML counts it by process."""

from __future__ import annotations

import ctypes
import os
from typing import Any

from traceml.inspection.kernel_state import ancestors_of, process_info
from traceml.inspection.program_names import program_name
from traceml.samplers.nvml import UNKNOWN, NvmlDevice

__all__ = ["DeviceSharing"]

_MAX_SAMPLES = 512
_NO_SAMPLES = 6  # NVML_ERROR_NOT_FOUND: no process has computed since


class _ProcessSample(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_uint),
        ("t_us", ctypes.c_ulonglong),
        ("sm_pct", ctypes.c_uint),
        ("memory_pct", ctypes.c_uint),
        ("encoder_pct", ctypes.c_uint),
        ("decoder_pct", ctypes.c_uint),
    )


class DeviceSharing:
    """Shares of the time in which kernels of other programs ran.

    They are known once a process of this job was seen: in a container the driver may name processes by the numbers of
    the host, which say nothing here.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        self._samples = (_ProcessSample * _MAX_SAMPLES)()
        self._read_us: dict[int, int] = {}  # time of the last sample, by device
        self._is_own: dict[int, dict[int, bool]] = {}  # by device: the processes of its last reading
        self._has_seen_own = False
        self._own = process_info(os.getpid())
        self._program = program_name(os.getpid())

    def others_pct(self, device: NvmlDevice) -> float:
        """Return the share of the time since the last call in which other programs computed, 0..100; -1: not known."""
        if device.mig is not None:  # counted for the whole GPU, or not at all
            return UNKNOWN

        count, last_us = ctypes.c_uint(_MAX_SAMPLES), self._read_us.get(device.index, 0)
        try:
            status = self._library.nvmlDeviceGetProcessUtilization(
                device.handle, self._samples, ctypes.byref(count), ctypes.c_ulonglong(last_us)
            )
        except AttributeError:  # an old driver
            return UNKNOWN

        if status not in (0, _NO_SAMPLES):
            return UNKNOWN

        return self._sum(device, [each for each in self._samples[: count.value if status == 0 else 0] if each.pid])

    def _sum(self, device: NvmlDevice, samples: list[Any]) -> float:
        by_process: dict[int, list[int]] = {}
        for sample in samples:
            by_process.setdefault(sample.pid, []).append(sample.sm_pct)

        known = self._is_own.get(device.index, {})  # one that has ended since cannot be looked up any more
        is_own = {pid: known[pid] if pid in known else self._belongs(pid) for pid in by_process}
        self._is_own[device.index] = is_own
        self._has_seen_own |= any(is_own.values())
        is_first = device.index not in self._read_us
        self._read_us[device.index] = max([self._read_us.get(device.index, 0), *(each.t_us for each in samples)])
        if is_first or not self._has_seen_own:  # the first samples are of before the run
            return UNKNOWN

        return min(sum(sum(found) / len(found) for pid, found in by_process.items() if not is_own[pid]), 100.0)

    def _belongs(self, pid: int) -> bool:
        """Return whether a process is of this job: this one, one below it, or another rank."""
        return self._descends(pid) or self._is_rank(pid)

    def _descends(self, pid: int) -> bool:
        return any(each.pid == os.getpid() for each in ancestors_of(pid))

    def _is_rank(self, pid: int) -> bool:
        """Return whether the same parent has started a process from the same program."""
        info = process_info(pid)
        if info is None or self._own is None:
            return False

        return info.parent == self._own.parent and program_name(pid) == self._program
