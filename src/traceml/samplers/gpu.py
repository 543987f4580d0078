"""GPU samples through NVML; local rank 0 samples all devices of its host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from traceml.database.schema import GPU, Table
from traceml.samplers.base import SampleRow
from traceml.samplers.nvml import Nvml, NvmlError

__all__ = ["GpuSampler"]


class GpuSampler:
    """Samples every device of the host.

    Args:
        nvml: the driver's interface; None: the installed driver.

    Raises:
        NvmlError: there is no driver or no device.
    """

    name: ClassVar[str] = "gpu"
    table: ClassVar[Table] = GPU
    start_interval_s: ClassVar[float | None] = None
    cost_us: ClassVar[float] = 100.0

    def __init__(self, nvml: Nvml | None = None) -> None:
        self._nvml = nvml or Nvml()
        self._devices = self._nvml.devices()
        if not self._devices:
            self._nvml.close()
            raise NvmlError("the driver reports no device")

    def sample(self, t_ns: int, step: int) -> Iterator[SampleRow]:  # noqa: ARG002 - the protocol's signature
        """Yield one row per device; a lost device does not hide the others."""
        lost: NvmlError | None = None
        for device in self._devices:
            try:
                yield t_ns, device.index, *self._nvml.figures(device)
            except NvmlError as error:
                lost = error

        if lost is not None:
            raise lost

    def close(self) -> None:
        """Release the driver."""
        self._nvml.close()
