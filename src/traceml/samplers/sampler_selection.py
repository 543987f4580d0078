"""Selection of the samplers that work on this machine."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from traceml.database.info_kinds import InfoSender
from traceml.fail_open import fail_open
from traceml.samplers.base import Sampler
from traceml.samplers.host import HostSampler
from traceml.samplers.limits import HostLimitsSampler, LimitsSampler
from traceml.samplers.nvidia_driver import VISIBLE_DEVICES, has_own_gpus, load_nvml
from traceml.samplers.process import ProcessSampler
from traceml.samplers.torch_memory import TorchMemorySampler
from traceml.samplers.worker_sampler import Groups, LoaderWorkersSampler

__all__ = ["open_samplers"]

_log = logging.getLogger("traceml")
_Factory = Callable[[], Sampler]


def open_samplers(
    *,
    local_rank: int,
    workers: Groups = tuple,
    save_folder: Callable[[], str | None] = lambda: None,
    training_thread: Callable[[], int | None] = lambda: threading.main_thread().ident,
    note: InfoSender | None = None,
) -> list[Sampler]:
    """Open the samplers that work on this machine; local rank 0 also opens those of the host.

    A rank that sees only GPUs of its own samples them too.

    Args:
        workers: returns (number of the loader, ids of its worker processes) of each iterator.
        training_thread: returns Python's number of the thread that trains.
        note: appends a row to `info`.
    """
    factories: list[_Factory] = [
        lambda: ProcessSampler(training_thread),
        lambda: TorchMemorySampler(note=note),
        LimitsSampler,
        lambda: LoaderWorkersSampler(workers),
    ]
    if local_rank == 0:
        factories += [HostSampler, lambda: _gpu_sampler(note), lambda: HostLimitsSampler(save_folder)]
    elif has_own_gpus(local_rank, os.environ.get(VISIBLE_DEVICES)):
        factories += [lambda: _gpu_sampler(note)]

    opened: list[Sampler] = []
    for factory in factories:
        with fail_open(_log, "samplers", "a sampler cannot be started"):  # the other samplers still work
            try:
                opened.append(factory())
            except OSError as error:  # this machine lacks what it reads, as the driver of GPUs
                _log.debug("a sampler has nothing to read on this machine: %s", error)

    return opened


def _gpu_sampler(note: InfoSender | None) -> Sampler:
    load_nvml()  # a machine without a driver is spared the 130 kB of the following code
    from traceml.samplers.gpu import GpuSampler

    return GpuSampler(note=note)
