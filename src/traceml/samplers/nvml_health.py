"""Faults of devices as NVML reports them: XID events, memory errors, rows that are remapped; and their limits."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from traceml.database.info_kinds import InfoKind, InfoSender
from traceml.samplers.nvml import CLOCK_SM, UNKNOWN, NvmlDevice

__all__ = ["DeviceHealth", "HealthWatch", "NvmlHealth"]

_UNCORRECTED, _VOLATILE = 1, 0  # kinds of memory errors, and of their counters
_XID_EVENTS = 0x8
_MAX_EVENTS = 16
_FABRIC_COMPLETED = 3
_EVERY_NS = 5 * 10**9


class DeviceHealth(NamedTuple):
    """Counters of a device; -1 where it does not offer one."""

    ecc_errors: int = UNKNOWN  # memory errors since the driver was loaded that ECC could not correct
    remap_pending: int = UNKNOWN  # 1 if memory waits for the next reset to be replaced, else 0
    remap_failed: int = UNKNOWN  # 1 if there was no spare memory to replace it, else 0
    max_clock_mhz: int = UNKNOWN  # highest clock of the SMs
    power_limit_w: int = UNKNOWN  # power that it may draw
    default_power_limit_w: int = UNKNOWN  # the same if nobody has changed it


class _EventData(ctypes.Structure):
    _fields_ = (
        ("device", ctypes.c_void_p),
        ("type", ctypes.c_ulonglong),
        ("data", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class _FabricInfo(ctypes.Structure):
    _fields_ = (
        ("cluster", ctypes.c_ubyte * 16),
        ("status", ctypes.c_int),
        ("clique", ctypes.c_uint),
        ("state", ctypes.c_ubyte),
    )


class NvmlHealth:
    """Faults that NVML reports; a query that the driver or the device lacks returns unknown values.

    Args:
        devices: the devices to watch for XID events from now on.
    """

    def __init__(self, library: Any, devices: Sequence[NvmlDevice]) -> None:
        self._library = library
        self._events: ctypes.c_void_p | None = None
        self._indices = {device.handle.value: device.index for device in devices}
        events = ctypes.c_void_p()
        if self._call("nvmlEventSetCreate", ctypes.byref(events)):
            registered = [
                self._call("nvmlDeviceRegisterEvents", device.handle, ctypes.c_ulonglong(_XID_EVENTS), events)
                for device in devices
            ]
            self._events = events if any(registered) else None

    def read(self, device: NvmlDevice) -> DeviceHealth:
        """Return the counters of a device."""
        errors, clock, limit, default = ctypes.c_ulonglong(), ctypes.c_uint(), ctypes.c_uint(), ctypes.c_uint()
        corrected, uncorrected, pending, failed = (ctypes.c_uint() for _ in range(4))
        has_errors = self._call(
            "nvmlDeviceGetTotalEccErrors", device.handle, ctypes.c_uint(_UNCORRECTED), ctypes.c_uint(_VOLATILE),
            ctypes.byref(errors),
        )  # fmt: skip
        has_rows = self._call(
            "nvmlDeviceGetRemappedRows", device.handle, *map(ctypes.byref, (corrected, uncorrected, pending, failed))
        )
        has_clock = self._call("nvmlDeviceGetMaxClockInfo", device.handle, ctypes.c_uint(CLOCK_SM), ctypes.byref(clock))
        has_limit = self._call("nvmlDeviceGetEnforcedPowerLimit", device.handle, ctypes.byref(limit))
        has_default = self._call("nvmlDeviceGetPowerManagementDefaultLimit", device.handle, ctypes.byref(default))
        return DeviceHealth(
            errors.value if has_errors else UNKNOWN,
            pending.value if has_rows else UNKNOWN,
            failed.value if has_rows else UNKNOWN,
            clock.value if has_clock else UNKNOWN,
            limit.value // 1000 if has_limit else UNKNOWN,
            default.value // 1000 if has_default else UNKNOWN,
        )

    def nvlink_domain(self, device: NvmlDevice) -> str | None:
        """Return the id of the NVLink domain of several hosts in which a device is; None if it is in none."""
        fabric = _FabricInfo()
        found = self._call("nvmlDeviceGetGpuFabricInfo", device.handle, ctypes.byref(fabric))
        if not found or fabric.state != _FABRIC_COMPLETED or fabric.status or not any(fabric.cluster):
            return None

        return f"{bytes(fabric.cluster).hex()}.{fabric.clique}"

    def xids(self) -> Iterable[tuple[int, int]]:
        """Yield (NVML's number of the device, XID) of the events since the last call, at most 16."""
        event = _EventData()
        for _ in range(_MAX_EVENTS if self._events is not None else 0):
            if not self._call("nvmlEventSetWait_v2", self._events, ctypes.byref(event), ctypes.c_uint(0)):
                return

            if event.type & _XID_EVENTS and event.device in self._indices:
                yield self._indices[event.device], event.data

    def close(self) -> None:
        """Stop watching."""
        if self._events is not None:
            self._call("nvmlEventSetFree", self._events)
            self._events = None

    def _call(self, name: str, *values: Any) -> bool:
        """Call a function; return whether the driver has it and it succeeded."""
        with suppress(AttributeError):  # an older driver
            return bool(getattr(self._library, name)(*values) == 0)

        return False


class HealthWatch:
    """Notes counters of devices when they change, and XID events; called at each sample.

    Args:
        note: appends rows to `info`: `gpu_health` with `index` and the counters, or `index`, `xid` and `step`; `nvlink`
            with the `domain` of this host.
    """

    def __init__(self, health: NvmlHealth, note: InfoSender) -> None:
        self._health, self._note = health, note
        self._before: dict[int, DeviceHealth] = {}
        self._due_ns = 0
        self._domain: str | None = None

    def check(self, t_ns: int, step: int, devices: Iterable[NvmlDevice]) -> None:
        """Look again if it is time."""
        if t_ns < self._due_ns:
            return

        self._due_ns = t_ns + _EVERY_NS
        for index, xid in self._health.xids():
            self._note(InfoKind.GPU_HEALTH, index=index, xid=xid, step=step)

        for device in devices:
            self._note_domain(device)
            now = self._health.read(device)
            if now != self._before.get(device.index, DeviceHealth()):
                self._note(InfoKind.GPU_HEALTH, index=device.index, step=step, **now._asdict())

            self._before[device.index] = now

    def _note_domain(self, device: NvmlDevice) -> None:
        """Note the NVLink domain of this host when it is known, which all of its devices share."""
        if self._domain is None and (domain := self._health.nvlink_domain(device)) is not None:
            self._domain = domain
            self._note(InfoKind.NVLINK, domain=domain)

    def close(self) -> None:
        """Stop watching."""
        self._health.close()
