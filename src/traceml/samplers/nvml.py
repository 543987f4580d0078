"""NVML by its C interface, whose library comes with the driver."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from traceml.samplers.nvidia_driver import device_entries, load_nvml

__all__ = ["CLOCK_SM", "UNKNOWN", "Nvml", "NvmlDevice", "NvmlError"]

CLOCK_SM = 1
"""NVML's number of the clock of the SMs."""
UNKNOWN = -1
"""Value of what the driver does not tell."""
_TEMPERATURE_GPU = 0
_UUID_BYTES = 96


class NvmlError(OSError):
    """NVML is missing, or a call returned an error."""


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


@dataclass(frozen=True, slots=True)
class NvmlDevice:
    """One device by its NVML handle."""

    index: int
    handle: ctypes.c_void_p
    # handle of the part of the GPU that is used, if it is a MIG device: its memory is its own
    mig: ctypes.c_void_p | None = None


class Nvml:
    """The calls of one sample. A figure that a device does not offer is -1.

    Args:
        library: a loaded libnvidia-ml; None: the driver's.

    Raises:
        NvmlError: there is no driver.
    """

    def __init__(self, library: Any = None) -> None:
        if library is None:
            try:
                library = load_nvml()
            except OSError as error:
                raise NvmlError(f"no NVML: {error}") from None

        self.library = library
        self._check("nvmlInit_v2", library.nvmlInit_v2())

    def devices(self, visible: str | None = None) -> list[NvmlDevice]:
        """Return the devices that this process may use.

        Args:
            visible: value of CUDA_VISIBLE_DEVICES, None if it is not set.
        """
        gpus = {device.index: device for device in self._gpus()}
        if visible is None:
            return list(gpus.values())

        named = _visible_gpus(visible, {index: self._uuid(device) for index, device in gpus.items()})
        found = [gpus[name] if isinstance(name, int) else self._mig_device(name, gpus) for name in named]
        return [device for device in found if device is not None]

    def _gpus(self) -> list[NvmlDevice]:
        count = ctypes.c_uint()
        self._check("nvmlDeviceGetCount_v2", self.library.nvmlDeviceGetCount_v2(ctypes.byref(count)))
        found = []
        for index in range(count.value):
            handle = ctypes.c_void_p()
            status = self.library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle))
            if status == 0:  # a device without permission, or off the bus, does not hide the others
                found.append(NvmlDevice(index, handle))

        return found

    def _uuid(self, device: NvmlDevice) -> str:
        text = ctypes.create_string_buffer(_UUID_BYTES)
        status = self.library.nvmlDeviceGetUUID(device.handle, text, ctypes.c_uint(_UUID_BYTES))
        return text.value.decode("ascii", "replace") if status == 0 else ""

    def _mig_device(self, name: str, gpus: Mapping[int, NvmlDevice]) -> NvmlDevice | None:
        """Return the MIG device of a name; None if there is none, or the driver knows no MIG devices."""
        mig, parent, index = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_uint()
        library = self.library
        try:
            status = (
                library.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(mig))
                or library.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(mig, ctypes.byref(parent))
                or library.nvmlDeviceGetIndex(parent, ctypes.byref(index))
            )
        except AttributeError:
            return None

        gpu = gpus.get(index.value) if status == 0 else None
        return replace(gpu, mig=mig) if gpu is not None else None

    def figures(self, device: NvmlDevice) -> tuple[float, int, int, float, float, int, int]:
        """Return utilization (%), used, total memory (bytes), temperature (C), power (W), clock (MHz), throttle mask.

        Raises:
            NvmlError: all calls fail: the device is lost.
        """
        library, handle = self.library, device.handle
        utilization, memory = _Utilization(), _Memory()
        temperature, milliwatts, clock = ctypes.c_uint(), ctypes.c_uint(), ctypes.c_uint()
        reasons = ctypes.c_ulonglong()
        answers = (
            library.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(utilization)) == 0,
            library.nvmlDeviceGetMemoryInfo(device.mig or handle, ctypes.byref(memory)) == 0,
            library.nvmlDeviceGetTemperature(handle, ctypes.c_uint(_TEMPERATURE_GPU), ctypes.byref(temperature)) == 0,
            library.nvmlDeviceGetPowerUsage(handle, ctypes.byref(milliwatts)) == 0,
            library.nvmlDeviceGetClockInfo(handle, ctypes.c_uint(CLOCK_SM), ctypes.byref(clock)) == 0,
            library.nvmlDeviceGetCurrentClocksThrottleReasons(handle, ctypes.byref(reasons)) == 0,
        )
        if not any(answers):
            raise NvmlError(f"device {device.index} does not respond")

        has_utilization, has_memory, has_temperature, has_power, has_clock, has_reasons = answers
        return (
            float(utilization.gpu) if has_utilization else UNKNOWN,
            memory.used if has_memory else UNKNOWN,
            memory.total if has_memory else UNKNOWN,
            float(temperature.value) if has_temperature else UNKNOWN,
            milliwatts.value / 1000 if has_power else UNKNOWN,
            clock.value if has_clock else UNKNOWN,
            reasons.value & 0x7FFFFFFFFFFFFFFF if has_reasons else UNKNOWN,
        )

    def close(self) -> None:
        """Release the driver."""
        self.library.nvmlShutdown()

    def _check(self, call: str, status: int) -> None:
        if status != 0:
            raise NvmlError(f"{call} returned {status}")


def _visible_gpus(text: str, uuids: Mapping[int, str]) -> list[int | str]:
    """Return the visible GPUs in CUDA's order: each by its index, or the name of a MIG device.

    The list ends at the first entry that names no device, as for CUDA, and a device that is named twice makes all
    invisible. Indices are taken as NVML's, which are CUDA's with CUDA_DEVICE_ORDER=PCI_BUS_ID, or with equal GPUs.
    """
    found: list[int | str] = []
    for entry in device_entries(text):
        device = _device_of(entry, uuids)
        if device is None:
            break

        found.append(device)

    return found if len(set(found)) == len(found) else []


def _device_of(entry: str, uuids: Mapping[int, str]) -> int | str | None:
    if entry.startswith("MIG-"):
        return entry

    if entry.startswith("GPU-"):
        alike = [index for index, uuid in uuids.items() if uuid.lower().startswith(entry.lower())]
        return alike[0] if len(alike) == 1 else None

    return int(entry) if entry.isdecimal() and int(entry) in uuids else None
