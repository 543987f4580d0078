"""Facts other than the steps: loaders, hosts, exits. Rules use them to avoid false blame and to give advice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from functools import cached_property, partial

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from traceml.database.schema import EPOCHS, Resource
from traceml.diagnosis.facts.blamed_lines import BlamedLine, is_waiting
from traceml.diagnosis.facts.core_waits import medians_of_others, ranks_without_core
from traceml.diagnosis.facts.device_events import GpuHealthHistory, TurnoverHistory
from traceml.diagnosis.facts.ends import EndingSignal, LostWorker, RankExit
from traceml.diagnosis.facts.growing_objects import GrowingObjects
from traceml.diagnosis.facts.machine_use import MachineSamples, MachineUse
from traceml.diagnosis.facts.memory_growth import MemoryHistory
from traceml.diagnosis.facts.numerics import LossHistory, SkippedSteps
from traceml.diagnosis.facts.pauses import PauseHistory
from traceml.diagnosis.facts.progress.rank_progress import JobProgress
from traceml.diagnosis.facts.resource_use import ResourceUse
from traceml.diagnosis.facts.run_time import RunTime
from traceml.diagnosis.facts.sampled_lines import OUTSIDE_STEPS, DividedLines, LineCounts, SampledLine
from traceml.diagnosis.facts.shared_batches import BatchHistory
from traceml.diagnosis.facts.topology import Topology
from traceml.diagnosis.facts.trainings.models_and_loaders import (
    EvaluationModeSteps,
    LoaderFacts,
    ModelFacts,
    UnchangedParameters,
)
from traceml.diagnosis.facts.wall_parts import Stop
from traceml.diagnosis.facts.worker_history import WorkerHistory, WorkerUse

__all__ = ["OVERSUBSCRIBED", "JobFacts"]

OVERSUBSCRIBED = 0.25
"""From this share of waiting for a CPU core, rules need stronger evidence to blame a rank or the network."""


class JobFacts(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """Facts for the rules in addition to the window; each has a value that means "not known"."""

    # The job
    world_size: int = 1  # ranks of the job
    state: str = "running"  # the run's state, as in the report
    time: RunTime | None = None  # the run's wall time by part; None if unknown
    first_step: int = 0  # number of the first step, where the script numbers its steps
    resumes_at: int = 0  # steps in the checkpoint from which the ranks, whose steps count from 0, have resumed
    backend: str | None = None  # that of the ranks' process group on the models' device (gloo, nccl); None if unknown
    store_restarts: int = 0  # restarts by torchrun, in each of which ranks meet by the same store
    rpc: bool = False  # whether ranks call functions of each other (torch.distributed.rpc)
    topology: Topology = msgspec.field(default_factory=Topology)  # places: hosts, switches, NVLink, device mesh
    hosts: Mapping[int, str] = {}  # rank -> host

    # Cores and other programs
    cores: Mapping[str, int] = {}  # host -> cores that the job may use there
    threads: int | None = None  # torch threads per rank
    bound_cores: Mapping[int, Collection[int]] = {}  # rank -> cores on which its training thread may run, if not all
    wait_of_ready_time: Mapping[int, float] = {}  # rank -> share of its ready time that a main thread waited for a core
    wait_of_wall_time: Mapping[int, float] = {}  # rank -> the same as a share of wall time in training
    core_wait_s: Mapping[int, float] = {}  # rank -> seconds of training in which its waits for a core were counted
    startup_wait_s: float = 0.0  # seconds that main threads waited for a core before the first step: median of ranks
    startup_run_s: float = 0.0  # seconds that they ran
    # name -> cores that other processes on the host of rank 0 used while ranks waited, the most first; '' are processes
    # of other users
    competing_processes: Mapping[str, float] = {}
    # the same of processes that the ranks have started, loader workers among them; None if unknown
    started_processes: Mapping[str, float] | None = None
    samples: MachineSamples = msgspec.field(default_factory=MachineSamples)  # use of cores, memory and devices

    # What is trained, and how
    model: ModelFacts = ModelFacts()  # the model that is trained
    accelerator: str | None = None  # type of device of the models (cuda, xpu); None if they are on the CPU
    # steps before which a model or optimizer of another size appeared; not those of the run's start
    other_models: tuple[int, ...] = ()
    # of these steps, those at which an earlier model was trained again -> first step of that model
    same_models: Mapping[int, int] = {}
    trainings_begin: tuple[int, ...] = ()  # first steps of later optimizers of other parameters: folds, trials
    fused: bool | None = None  # whether the optimizer is a fused one; None if no fused form of it is known
    history_bytes: int = 0  # that an optimizer keeps of past steps at most, as L-BFGS does; 0 without such a history
    # (file, function) of code that reads gradients outside the phases: it may change them, or update weights
    own_updates: frozenset[tuple[str, str]] = frozenset()
    compile_s: float | None = None  # seconds that torch.compile took; None if unknown, as before the end
    single_calls: int = 0  # calls of the model for a batch of so many samples, with one each; 0 unless it is called so
    autocast: bool = False  # whether the training runs under torch.autocast, be it inside the model
    tf32: bool = False  # whether CUDA may compute with its values of 32 bits in TF32
    detects_anomalies: bool = False  # whether autograd's detection of anomalies is on
    evaluation_mode: EvaluationModeSteps | None = None  # steps in which a model was trained in `eval()`
    keeps_gradients: str | None = None  # class of an optimizer whose gradients are never cleared
    # rank -> optimizers of which no parameter has changed so far
    unchanged_weights: Mapping[int, UnchangedParameters] = {}
    profiles: bool = False  # whether torch's profiler was on in all steps, as far as they were looked at
    collects: bool = False  # whether it collects by its model what it trains on: rollouts of reinforcement learning
    plays: bool = False  # whether models are called between trainings, without a loader, with one sample each time
    plain_evaluation: bool = False  # whether a trained model is evaluated without gradients
    evaluates_gradients: bool = False  # whether gradients are computed in evaluations, as forces are
    launches: bool = False  # whether the script runs functions by `traceml.launch` without tracing them
    only_logs: bool = False  # whether the script logs values and is not traced

    # Data
    loader: LoaderFacts | None = None  # the training data loader
    # rank -> its data loaders, in the order of their first use; of equal ones in a row the first
    loaders: Mapping[int, Sequence[LoaderFacts]] = {}
    workers: WorkerHistory = msgspec.field(default_factory=WorkerHistory)  # worker processes of loaders over the run
    # rows of `schema.EPOCHS` of the lowest rank: steps that waited for the first batch of an iterator
    epochs: NDArray[np.void] = np.empty(0, EPOCHS.dtype)
    read_micro_batches: Callable[[], float] = lambda: 1.0  # reads the kept steps of all ranks: see `micro_batches`
    batch_tensors: int = 0  # tensors of the largest of some batches, as a loader returns it; 0 if unknown
    batch_bytes: int = 0  # its bytes
    pinned_share: float | None = None  # share of the bytes that some copies to a device took from pinned memory
    non_blocking_share: float | None = None  # the same of copies with `non_blocking=True`
    batches: BatchHistory = msgspec.field(default_factory=BatchHistory)  # with how ranks exchange gradients
    # numbers of loaders whose DistributedSampler drew one order in several epochs: no `set_epoch`
    same_order: frozenset[int] = frozenset()

    # Numbers
    losses: LossHistory = msgspec.field(default_factory=LossHistory)  # losses that were read
    skipped: SkippedSteps = msgspec.field(default_factory=SkippedSteps)  # steps without an update
    unread_skips: bool = False  # whether a fused optimizer skips steps on a device, which are not among these

    # Progress, pauses and ends
    latest: tuple[int, ...] = ()  # last step of each rank, -1 before the first
    progress: JobProgress | None = None  # progress of each rank; None if unknown
    pauses: PauseHistory = msgspec.field(default_factory=PauseHistory)  # by the interpreter or torch.compile
    stops: Mapping[int, Sequence[Stop]] = {}  # rank -> times in which its process did not run
    joined: Mapping[int, Sequence[int]] = {}  # rank -> steps at which it has left `with Join(...)`, to wait for others
    exits: tuple[RankExit, ...] = ()  # ends of ranks
    lost_workers: Mapping[int, Sequence[LostWorker]] = {}  # rank -> loader workers that died, the first of them
    ended_by: EndingSignal | None = None  # signal that the launcher received and that ended the job; None without one
    job_end_s: float | None = None  # epoch second at which the scheduler ends the job; None if it has no limit
    job_limit_s: float | None = None  # that limit as a duration, seconds; None if unknown

    # Memory, limits and devices
    memory: MemoryHistory = msgspec.field(default_factory=MemoryHistory)  # of ranks, devices and hosts
    growing: Mapping[int, Sequence[GrowingObjects]] = {}  # rank -> containers that grew while its memory did
    limits: tuple[ResourceUse, ...] = ()  # use of resources that have a limit
    save_folders: Mapping[int, str] = {}  # rank -> folder into which it wrote checkpoints
    # device memory that ranks give back to the driver and request again
    turnover: TurnoverHistory = msgspec.field(default_factory=TurnoverHistory)
    health: GpuHealthHistory = msgspec.field(default_factory=GpuHealthHistory)  # faults and throttling of devices

    # Lines in which threads were seen
    lines: Sequence[SampledLine] = ()  # lines in which the training threads were seen
    # the same in some steps, and in the others, by interval of the run
    divided_lines: Callable[[Container[int]], DividedLines] = partial(LineCounts({}).divided, (), ())
    # the same, of times in which none of some steps was open
    lines_apart: Callable[[Collection[int]], tuple[SampledLine, ...]] = partial(LineCounts({}).apart_from, (), ())
    # lines in which the busiest other Python threads were seen, with the CPU time of all of them
    thread_lines: Sequence[SampledLine] = ()
    # loader -> lines in which its workers were seen while they made batches, and how often they were idle in between
    lines_of_workers: Mapping[int, Sequence[SampledLine]] = {}

    @property
    def last_step(self) -> int:
        """Newest step of any rank; -1 before the first."""
        return max(self.latest, default=-1)

    @property
    def steps_made(self) -> int:
        """Steps of this run: a script that numbers them may count those before it, too."""
        return self.last_step + 1 - self.first_step

    @property
    def compiles(self) -> bool:
        """Whether the script compiles the model, or something else: which part it is may be unknown."""
        return bool(self.model.compiled or self.compile_s)

    @property
    def may_lower_precision(self) -> bool:
        """Whether fewer bits would make the model faster: not on a CPU, as a rule, nor where it computes in 16 bits."""
        return self.accelerator is not None and not self.has_16_bits

    @property
    def has_16_bits(self) -> bool:
        """Whether the model computes in 16 bits: by its weights, or under autocast."""
        return self.autocast or self.model.has_16_bits

    def lines_without(self, steps: Collection[int]) -> Sequence[SampledLine]:
        """Return the lines, those in phases only of times in which none of some steps was open, where that is known."""
        divided = {each.rank for some in self.divided_lines(steps) for each in some}
        kept = [each for each in self.lines if each.part in OUTSIDE_STEPS or each.rank not in divided]
        return (*self.lines_apart(steps), *kept)

    def loader_of(self, rank: int, number: int) -> LoaderFacts | None:
        """Return a loader of a rank by its number; None if unknown."""
        before = [each for each in self.loaders.get(rank, ()) if each.number is not None and each.number <= number]
        return before[-1] if before else None

    def with_loader_beside(self, late: Collection[int]) -> JobFacts:
        """Return the facts with the training's loader as other ranks have it, where late ones have another one."""
        number = self.loader.number if self.loader else None
        if number is None or not late:
            return self

        known = (self.loader_of(rank, number) for rank in sorted(self.loaders) if rank not in late)
        return next((replace(self, loader=each) for each in known if each is not None), self)

    @cached_property
    def micro_batches(self) -> float:
        """Batches of a step, as gradients are accumulated; at least 1."""
        return self.read_micro_batches()

    @cached_property
    def worker_lines(self) -> Sequence[SampledLine]:
        """Those lines of the workers of the training's loader, and of those like it."""
        by_loader = sorted(self.lines_of_workers.items())
        return [each for number, lines in by_loader for each in lines if self._is_like_trained(each.rank, number)]

    @cached_property
    def other_loader(self) -> tuple[LoaderFacts, Sequence[SampledLine]] | None:
        """Of the other loaders the one whose workers made batches most often, and their lines; None without any.

        Loaders that are alike count as one. An evaluation has another loader.
        """
        loaders: dict[object, tuple[LoaderFacts, list[SampledLine]]] = {}
        for number, lines in self.lines_of_workers.items():
            for each in lines:
                loader = self.loader_of(each.rank, number)
                if loader is not None and not self._is_like_trained(each.rank, number):
                    loaders.setdefault(loader.signature, (loader, []))[1].append(each)

        return max(
            loaders.values(), key=lambda one: sum(each.samples for each in one[1] if not each.is_idle), default=None
        )

    @cached_property
    def other_loaders(self) -> list[LoaderFacts]:
        """All loaders but the training's and those like it, as those of evaluations; alike ones count as one."""
        others = {
            loader.signature: loader
            for rank, loaders in self.loaders.items()
            for loader in loaders
            if not self._is_like_trained(rank, loader.number or 0)
        }
        return list(others.values())

    @property
    def loader_workers(self) -> int:
        """Number of workers of the training's loader; 0 without any."""
        return (self.loader.num_workers if self.loader else None) or 0

    @property
    def has_loader_workers(self) -> bool:
        """Whether any loader of a rank has workers, also that of an evaluation."""
        return self.loader_workers > 0 or any(each.num_workers for some in self.loaders.values() for each in some)

    @cached_property
    def epochs_of_repeats(self) -> int:
        """Number of epochs in which all workers of the training's loader made the same first batch; 0 if not in all."""
        return self.batches.repeated_by_workers(self.epochs["step"].tolist(), self.loader_workers)

    def of_host(self, rank: int) -> str:
        """Return ` of node1` for a rank's host; empty if there is one host, or that of the rank is not known."""
        return f" of {self.hosts[rank]}" if len(set(self.hosts.values())) > 1 and rank in self.hosts else ""

    @cached_property
    def unseen_ranks(self) -> list[int]:
        """Ranks of the job of which the run has nothing, as of those of another node with a run of its own."""
        with_steps = {rank for rank, step in enumerate(self.latest) if step >= 0}
        return sorted(set(range(self.world_size)) - with_steps - self.hosts.keys()) if self.hosts else []

    @cached_property
    def wait_share(self) -> float:
        """Share of ready time in which main threads waited for a core: the median over ranks, 0 if unknown."""
        return float(np.median(list(self.wait_of_ready_time.values()))) if self.wait_of_ready_time else 0.0

    @cached_property
    def without_core(self) -> frozenset[int]:
        """Ranks whose main thread waited for a core, more than those of the others."""
        return ranks_without_core(self.wait_of_ready_time)

    def core_wait_of_others(self, ranks: Collection[int]) -> float | None:
        """Return the median share of wall time that all ranks but these waited for a core; None if unknown."""
        return _of_others(ranks, self.wait_of_wall_time, self._medians_of_core_wait)

    def core_run(self, ranks: Collection[int]) -> tuple[float, float] | None:
        """Return the shares of wall time that main threads of ranks ran, the mean, and of all others, the median.

        None if unknown: what runs without ever waiting for a core is not.
        """
        runs = self.core_runs
        if not ranks or not runs.keys() >= set(ranks):
            return None

        others = _of_others(ranks, runs, self._medians_of_core_run)
        return (float(np.mean([runs[rank] for rank in ranks])), others) if others else None

    @cached_property
    def _medians_of_core_wait(self) -> dict[int, float]:
        return medians_of_others(self.wait_of_wall_time)

    @cached_property
    def core_runs(self) -> dict[int, float]:
        """Share of wall time that the main thread of each rank ran, where it is known."""
        ready = (
            (rank, waited, self.wait_of_ready_time.get(rank, 0.0)) for rank, waited in self.wait_of_wall_time.items()
        )
        return {rank: waited * (1 - share) / share for rank, waited, share in ready if share > 0}

    @cached_property
    def _medians_of_core_run(self) -> dict[int, float]:
        return medians_of_others(self.core_runs)

    def waits_in(self, part: str, line: BlamedLine) -> bool:
        """Return whether a function waits in a phase (for a sleep, a disk, a thread), and does not compute."""
        return is_waiting(self.lines, part, line, self.wait_share, self.asleep_share)

    @cached_property
    def asleep_share(self) -> float:
        """Share of wall time in which a main thread neither ran nor waited for a core, of the rank with the most.

        1 where no rank has waited for a core, or that is not known.
        """
        return max((1.0 - run - self.wait_of_wall_time[rank] for rank, run in self.core_runs.items()), default=1.0)

    @property
    def waited_share(self) -> float:
        """`wait_share` as a share of wall time, where that is known; else of ready time."""
        return float(np.median(list(self.wait_of_wall_time.values()))) if self.wait_of_wall_time else self.wait_share

    @property
    def oversubscribed(self) -> bool:
        """Whether the ranks had too few cores, so that lateness may be chance."""
        return self.wait_share >= OVERSUBSCRIBED

    @cached_property
    def communication_waits(self) -> dict[int, float]:
        """Share of wall time that threads which communicate wait for a core, by rank; empty if unknown.

        All threads but the main one run for so long, and wait in the same proportion as that does. Torch's own compute
        for the main one, and those of the script do anything: where there are such, nothing is known.
        """
        if not self.oversubscribed or self.threads != 1 or self.thread_lines:
            return {}

        shares = (
            (rank, cores, self.wait_of_ready_time.get(rank)) for rank, cores in self.samples.background_cores().items()
        )
        return {rank: cores * share / (1.0 - share) for rank, cores, share in shares if share is not None and share < 1}

    def is_core_wait(self, share: float, *, in_communication: bool = False) -> bool:
        """Return whether ranks lacked cores, and waited for one that share of the time: it may be the whole cause.

        Args:
            in_communication: whether waits of threads that communicate are part of that time, too.
        """
        waits = list(self.communication_waits.values()) if in_communication else []
        waited = self.waited_share + (float(np.median(waits)) if waits else 0.0)
        return self.oversubscribed and bool(self.wait_of_wall_time) and share <= waited

    @cached_property
    def worker_use(self) -> WorkerUse | None:
        """Use of cores by the workers of the training's loader, and of those like it; None if unknown."""
        is_known = self.loader is not None and self.loader.number is not None
        return self.workers.use(self._is_like_trained if is_known else None)

    def workers_waited(self, first: int, last: int) -> float | None:
        """Return the share of the time from one step to another that its workers waited for a core; None if unknown."""
        return self.workers.waited(first, last, self._is_like_trained) if self.loader_workers else None

    def _is_like_trained(self, rank: int, number: int) -> bool:
        """Return whether a rank's loader is the training's, or like it: a script may make one for each epoch."""
        found = self.loader_of(rank, number)
        if self.loader is None or found is None:
            return number == ((self.loader.number or 0) if self.loader else 0)

        return found.signature == self.loader.signature

    def has_memory_limit(self, host: str | None) -> bool:
        """Whether the memory that counts on a host is that of a container, by its limit."""
        return any(use.resource is Resource.MEMORY and self.hosts.get(use.rank) == host for use in self.limits)

    @cached_property
    def use(self) -> MachineUse:
        """Use of cores and devices during the training."""
        return self.samples.use()

    @property
    def is_on_one_host(self) -> bool:
        """Whether all ranks are known to be on one host: no network is between them."""
        return len(self.hosts) >= self.world_size and len(set(self.hosts.values())) == 1

    @property
    def ranks_beside_first(self) -> int:
        """Number of ranks on the host of rank 0, that one included; 1 if no hosts are known."""
        return max(sum(host == self.hosts.get(0) for host in self.hosts.values()), 1)

    @property
    def others_cores(self) -> float | None:
        """Cores that programs other than the ranks used on the host of rank 0; None if unknown."""
        return self.use.others_cores(self.ranks_beside_first)

    @property
    def cores_per_rank(self) -> int | None:
        """Cores per rank of a host (the least over hosts), None if unknown."""
        per_host = Counter(self.hosts.values())
        shares = [self.cores[host] // count for host, count in per_host.items() if host in self.cores]
        return max(1, min(shares)) if shares else None


def _of_others(ranks: Collection[int], shares: Mapping[int, float], medians: Mapping[int, float]) -> float | None:
    if len(ranks) == 1:  # as thousands are judged one by one
        return medians.get(*ranks)

    late = set(ranks)
    others = [share for rank, share in shares.items() if rank not in late]
    return float(np.median(others)) if others else None
