"""Facts other than the steps: loaders, hosts, exits. Rules use them to avoid false blame and to give advice."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property

import msgspec
import numpy as np
from numpy.typing import NDArray

from traceml.database.schema import EPOCHS, Resource
from traceml.diagnosis.facts.core_waits import medians_of_others, ranks_without_core
from traceml.diagnosis.facts.device_events import GpuHealthHistory, TurnoverHistory
from traceml.diagnosis.facts.ends.ending_signal import EndingSignal
from traceml.diagnosis.facts.ends.lost_workers import LostWorker
from traceml.diagnosis.facts.ends.rank_exit import RankExit
from traceml.diagnosis.facts.growing_objects import GrowingObjects
from traceml.diagnosis.facts.machine_use import MachineSamples, MachineUse
from traceml.diagnosis.facts.memory_growth import MemoryHistory
from traceml.diagnosis.facts.numerics import LossHistory, SkippedSteps
from traceml.diagnosis.facts.pauses import PauseHistory
from traceml.diagnosis.facts.progress.rank_progress import JobProgress
from traceml.diagnosis.facts.resource_use import ResourceUse
from traceml.diagnosis.facts.run_time import RunTime
from traceml.diagnosis.facts.sampled_lines import SampledLine, StretchLines
from traceml.diagnosis.facts.shared_batches import BatchHistory
from traceml.diagnosis.facts.topology import Topology
from traceml.diagnosis.facts.trainings.models_and_loaders import LoaderFacts, ModelFacts
from traceml.diagnosis.facts.wall_parts import Stop
from traceml.diagnosis.facts.worker_history import WorkerHistory, WorkerUse

__all__ = ["OVERSUBSCRIBED", "JobFacts"]

OVERSUBSCRIBED = 0.25
"""From this share of waiting for a CPU core, rules need stronger evidence to blame a rank or the network."""


class JobFacts(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """Facts for the rules in addition to the window; each has a value that means "not known".

    Attributes:
        group: whether the ranks share a process group; None if only the rows can show it.
        backend: the group's backend (gloo, nccl).
        hosts: rank -> host.
        cores: host -> cores that the job may use there.
        threads: torch threads per rank.
        main_wait: rank -> share of its main thread's ready time in which it waited for a core.
        core_wait: rank -> the same as a share of wall time in training.
        core_wait_s: rank -> seconds of training in which its waits for a core were counted.
        startup_wait_s: seconds that main threads waited for a core before the first step: the median over ranks.
        startup_run_s: seconds that they ran.
        competing_processes: name -> cores that other processes on the host of rank 0 used meanwhile, those that used
            most; '' are processes of other users.
        samples: use of cores, memory and devices over the run.
        rpc: whether ranks call functions of each other (torch.distributed.rpc).
        fused: whether the optimizer is a fused one; None where no fused form of it is known.
        detects_anomalies: whether autograd's detection of anomalies is on.
        profiles: whether torch's profiler was on in all steps, as far as they were looked at.
        collects: whether the script collects by its model what it trains on: rollouts of reinforcement learning.
        plays: whether models are called between trainings, without a loader, with one sample each time.
        plain_evaluation: whether a trained model is evaluated without gradients.
        same_order: numbers of loaders whose DistributedSampler drew one order in several epochs: no `set_epoch`.
        own_updates: (file, function) of code that reads gradients in trainings without an optimizer.
        only_logs: whether the script logs values and is not traced.
        other_models: steps before which a model or optimizer of another size appeared; not those of the run's start.
        same_models: of these steps, those at which an earlier model was trained again -> first step of that model.
        trainings_begin: first steps of optimizers of other parameters, but at the run's start: folds, trials.
        compile_s: seconds that torch.compile took; None where it is not known, as before the end.
        loader: the training data loader.
        loaders: rank -> its data loaders, in the order of their first use; of equal ones in a row the first.
        workers: worker processes of loaders over the run.
        lost_workers: rank -> loader workers that died, the first of them.
        growing: rank -> containers that grew while its memory did, at its last reading.
        ended_by: signal that the launcher received and that ended the job; None without one.
        job_end_s: epoch second at which the scheduler ends the job; None where it has no limit.
        job_limit_s: that limit as a duration, seconds; None where it is not known.
        limits: use of resources that have a limit.
        save_folders: rank -> folder into which it wrote checkpoints.
        memory: memory of ranks, devices and hosts over the run.
        lines: lines in which the training threads were seen.
        stretch_lines: the same by stretch of the run.
        thread_lines: lines in which the busiest other Python threads were seen, with the CPU time of all of them.
        skipped: steps without an update.
        epochs: rows of `schema.EPOCHS` of the lowest rank: steps that waited for the first batch of an iterator.
        time: the run's wall time by part; None where it is not known.
        state: the run's state, as in the report.
        batches: fingerprints of batches, and how ranks exchange gradients.
        latest: last step of each rank, -1 before the first.
        progress: progress of each rank; None where it is not known.
        pauses: times in which the interpreter or torch.compile paused the training.
        stops: rank -> times in which its process did not run.
        joined: rank -> steps at which it has left `with Join(...)`, and waited for ranks with more batches.
        turnover: device memory that ranks give back to the driver and request again.
        resumes_at: steps in the checkpoint from which the ranks, whose steps count from 0, have resumed.
        topology: place of each rank: host, switches, NVLink domain, coordinates of the device mesh.
    """

    world_size: int = 1
    resumes_at: int = 0
    group: bool | None = None
    backend: str | None = None
    hosts: Mapping[int, str] = {}
    cores: Mapping[str, int] = {}
    threads: int | None = None
    main_wait: Mapping[int, float] = {}
    core_wait: Mapping[int, float] = {}
    core_wait_s: Mapping[int, float] = {}
    startup_wait_s: float = 0.0
    startup_run_s: float = 0.0
    competing_processes: Mapping[str, float] = {}
    samples: MachineSamples = msgspec.field(default_factory=MachineSamples)
    model: ModelFacts | None = None
    rpc: bool = False
    fused: bool | None = None
    detects_anomalies: bool = False
    profiles: bool = False
    collects: bool = False
    plays: bool = False
    plain_evaluation: bool = False
    same_order: frozenset[int] = frozenset()
    own_updates: frozenset[tuple[str, str]] = frozenset()
    only_logs: bool = False
    other_models: tuple[int, ...] = ()
    same_models: Mapping[int, int] = {}
    trainings_begin: tuple[int, ...] = ()
    compile_s: float | None = None
    loader: LoaderFacts | None = None
    loaders: Mapping[int, Sequence[LoaderFacts]] = {}
    workers: WorkerHistory = msgspec.field(default_factory=WorkerHistory)
    lost_workers: Mapping[int, Sequence[LostWorker]] = {}
    growing: Mapping[int, Sequence[GrowingObjects]] = {}
    exits: tuple[RankExit, ...] = ()
    ended_by: EndingSignal | None = None
    job_end_s: float | None = None
    job_limit_s: float | None = None
    limits: tuple[ResourceUse, ...] = ()
    save_folders: Mapping[int, str] = {}
    memory: MemoryHistory = msgspec.field(default_factory=MemoryHistory)
    lines: Sequence[SampledLine] = ()
    thread_lines: Sequence[SampledLine] = ()
    stretch_lines: StretchLines = msgspec.field(default_factory=StretchLines)
    skipped: SkippedSteps | None = None
    epochs: NDArray[np.void] = msgspec.field(default_factory=lambda: np.empty(0, EPOCHS.dtype))
    time: RunTime | None = None
    state: str = "running"
    losses: LossHistory | None = None
    batches: BatchHistory | None = None
    latest: tuple[int, ...] = ()
    progress: JobProgress | None = None
    pauses: PauseHistory = msgspec.field(default_factory=PauseHistory)
    stops: Mapping[int, Sequence[Stop]] = {}
    joined: Mapping[int, Sequence[int]] = {}
    turnover: TurnoverHistory = msgspec.field(default_factory=TurnoverHistory)
    health: GpuHealthHistory = msgspec.field(default_factory=GpuHealthHistory)
    topology: Topology = msgspec.field(default_factory=Topology)

    def loader_of(self, rank: int, number: int) -> LoaderFacts | None:
        """Return a loader of a rank by its number; None where it is not known."""
        before = [each for each in self.loaders.get(rank, ()) if each.number is not None and each.number <= number]
        return before[-1] if before else None

    @property
    def loader_workers(self) -> int:
        """Number of workers of the training's loader; 0 without any."""
        return (self.loader.num_workers if self.loader else None) or 0

    def of_host(self, rank: int) -> str:
        """Return ` of node1` for a rank's host; empty where there is one host, or that of the rank is not known."""
        return f" of {self.hosts[rank]}" if len(set(self.hosts.values())) > 1 and rank in self.hosts else ""

    @cached_property
    def wait_share(self) -> float:
        """Share of ready time in which main threads waited for a core: the median over ranks, 0 where not known."""
        return float(np.median(list(self.main_wait.values()))) if self.main_wait else 0.0

    @cached_property
    def without_core(self) -> frozenset[int]:
        """Ranks whose main thread waited for a core, more than those of the others."""
        return ranks_without_core(self.main_wait)

    def core_wait_of_others(self, ranks: Collection[int]) -> float | None:
        """Return the median share of wall time that all ranks but these waited for a core; None where not known."""
        return _of_others(ranks, self.core_wait, self._medians_of_core_wait)

    def core_run(self, ranks: Collection[int]) -> tuple[float, float] | None:
        """Return the shares of wall time that main threads of ranks ran, the mean, and of all others, the median.

        None where that is not known: what runs without ever waiting for a core is not.
        """
        runs = self.core_runs
        if not ranks or not runs.keys() >= set(ranks):
            return None

        others = _of_others(ranks, runs, self._medians_of_core_run)
        return (float(np.mean([runs[rank] for rank in ranks])), others) if others else None

    @cached_property
    def _medians_of_core_wait(self) -> dict[int, float]:
        return medians_of_others(self.core_wait)

    def core_runs_of_others(self, ranks: Collection[int]) -> list[float]:
        """Return the share of wall time that the main thread of each rank but these ran, where it is known."""
        return [run for rank, run in self.core_runs.items() if rank not in ranks]

    @cached_property
    def core_runs(self) -> dict[int, float]:
        """Share of wall time that the main thread of each rank ran, where it is known."""
        ready = ((rank, waited, self.main_wait.get(rank, 0.0)) for rank, waited in self.core_wait.items())
        return {rank: waited * (1 - share) / share for rank, waited, share in ready if share > 0}

    @cached_property
    def _medians_of_core_run(self) -> dict[int, float]:
        return medians_of_others(self.core_runs)

    @property
    def waited_share(self) -> float:
        """The same as a share of wall time, where that is known; else of ready time."""
        return float(np.median(list(self.core_wait.values()))) if self.core_wait else self.wait_share

    @property
    def oversubscribed(self) -> bool:
        """Whether the ranks had too few cores, so that lateness may be chance."""
        return self.wait_share >= OVERSUBSCRIBED

    def is_core_wait(self, share: float) -> bool:
        """Return whether ranks lacked cores, and waited for one that share of the time: it may be the whole cause."""
        return self.oversubscribed and bool(self.core_wait) and share <= self.waited_share

    @cached_property
    def worker_use(self) -> WorkerUse | None:
        """Use of cores by the workers of the training's loader, or of one like it; None where it is not known."""
        loader = self.loader
        if loader is None or loader.number is None:
            return self.workers.use()

        known = (each for loaders in self.loaders.values() for each in loaders if each.likeness == loader.likeness)
        return self.workers.use({loader.number, *(each.number for each in known if each.number is not None)})

    @property
    def workers_busy(self) -> float | None:
        """Share of the time in which a loader worker computes; None where it is not known."""
        return None if self.worker_use is None else self.worker_use.busy

    def has_memory_limit(self, host: str | None) -> bool:
        """Whether the memory that counts on a host is that of a container, by its limit."""
        return any(use.resource is Resource.MEMORY and self.hosts.get(use.rank) == host for use in self.limits)

    @cached_property
    def use(self) -> MachineUse:
        """Use of cores and devices during the training."""
        return self.samples.use()

    @property
    def others_cores(self) -> float | None:
        """Cores that programs other than the ranks used on the host of rank 0; None where that is not known."""
        use = self.use
        if use.host_cores is None or use.busy_cores is None:
            return None

        here = sum(host == self.hosts.get(0) for host in self.hosts.values())
        return max(use.host_cores - max(here, 1) * use.busy_cores, 0.0)

    @property
    def cores_per_rank(self) -> int | None:
        """Cores per rank of a host (the least over hosts), None where not known."""
        per_host: dict[str, int] = {}
        for host in self.hosts.values():
            per_host[host] = per_host.get(host, 0) + 1

        shares = [self.cores[host] // count for host, count in per_host.items() if host in self.cores]
        return max(1, min(shares)) if shares else None


def _of_others(ranks: Collection[int], shares: Mapping[int, float], medians: Mapping[int, float]) -> float | None:
    if len(ranks) == 1:  # as thousands are judged one by one
        return medians.get(*ranks)

    late = set(ranks)
    others = [share for rank, share in shares.items() if rank not in late]
    return float(np.median(others)) if others else None
