"""GPU samples through NVML: of the devices that this process may use, by one rank for all that see them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import ClassVar

from traceml.database.info_kinds import InfoSender
from traceml.database.schema import GPU, Table
from traceml.samplers.base import Sampler, SampleRow
from traceml.samplers.nvidia_driver import VISIBLE_DEVICES
from traceml.samplers.nvml import Nvml, NvmlError
from traceml.samplers.nvml_health import HealthWatch, NvmlHealth
from traceml.samplers.nvml_processes import DeviceSharing
from traceml.samplers.torch_memory import initialized_cuda

__all__ = ["GpuSampler"]


class GpuSampler(Sampler):
    """Samples every visible device: others may be another user's.

    Args:
        nvml: the driver's interface; None: the installed driver.
        note: appends a row to `info`, about faults of the devices.

    Raises:
        NvmlError: there is no driver, or no device is visible.
    """

    name: ClassVar[str] = "gpu"
    table: ClassVar[Table] = GPU

    def __init__(self, nvml: Nvml | None = None, note: InfoSender | None = None) -> None:
        self._nvml = nvml or Nvml()
        self._visible = os.environ.get(VISIBLE_DEVICES)
        self._devices = self._nvml.devices(self._visible)
        if not self._devices:
            self._nvml.close()
            raise NvmlError("the driver reports no device, or none is visible")

        self._sharing = DeviceSharing(self._nvml.library)
        self._faults = HealthWatch(NvmlHealth(self._nvml.library, self._devices), note) if note is not None else None

    def sample(self, t_ns: int, step: int) -> Iterator[SampleRow]:
        """Yield one row per device; a lost device does not hide the others."""
        self._follow_variable()
        if self._faults is not None:
            self._faults.check(t_ns, step, self._devices)

        lost: NvmlError | None = None
        for device in self._devices:
            try:
                yield t_ns, device.index, *self._nvml.figures(device), self._sharing.others_pct(device)
            except NvmlError as error:
                lost = error

        if lost is not None:
            raise lost

    def _follow_variable(self) -> None:
        """Use the devices that the script has made visible since, as CUDA does until it is initialized."""
        visible = os.environ.get(VISIBLE_DEVICES)
        if visible == self._visible or initialized_cuda() is not None:
            return

        self._visible, self._devices = visible, self._nvml.devices(visible)

    def close(self) -> None:
        """Release the driver."""
        if self._faults is not None:
            self._faults.close()

        self._nvml.close()
