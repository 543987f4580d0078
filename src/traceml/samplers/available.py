"""Which samplers work here."""

from __future__ import annotations

import logging
from collections.abc import Callable

from traceml.samplers.base import Sampler
from traceml.samplers.gpu import GpuSampler
from traceml.samplers.host import HostSampler
from traceml.samplers.process import ProcessSampler
from traceml.samplers.torch_memory import TorchMemorySampler

__all__ = ["open_samplers"]

_log = logging.getLogger("traceml")
_Factory = Callable[[], Sampler]


def open_samplers(*, local_rank: int) -> list[Sampler]:
    """Open what this machine offers; local rank 0 also samples what the ranks of a host share.

    Args:
        local_rank: this rank among those of its host.
    """
    factories: list[_Factory] = [ProcessSampler, TorchMemorySampler]
    if local_rank == 0:
        factories += [HostSampler, GpuSampler]

    opened: list[Sampler] = []
    for factory in factories:
        try:
            opened.append(factory())
        except Exception as error:  # noqa: BLE001 - fail open: what is not there is not sampled
            _log.debug("no %s on this machine: %s", getattr(factory, "name", factory), error)

    return opened
