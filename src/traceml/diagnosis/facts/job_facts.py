"""Facts besides the steps: loaders, hosts, exits. Rules use them to avoid false blame and to give advice."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from signal import SIGINT
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.database.schema import EPOCHS, GPU, HOST, PROCESS
from traceml.diagnosis.facts.core_waits import CoreTakerHistory, CoreWaits, medians_of_others, ranks_without_core
from traceml.diagnosis.facts.devices.gpu_health import GpuHealthHistory
from traceml.diagnosis.facts.devices.segment_turnover import TurnoverHistory
from traceml.diagnosis.facts.ending_signal import EndingSignal
from traceml.diagnosis.facts.growing_objects import GrowingObjects, growing_of
from traceml.diagnosis.facts.loss_history import LossHistory
from traceml.diagnosis.facts.lost_workers import LostWorker, lost_worker_of
from traceml.diagnosis.facts.machine_use import MachineSamples, MachineUse
from traceml.diagnosis.facts.memory_growth import MemoryHistory
from traceml.diagnosis.facts.pauses import PauseHistory
from traceml.diagnosis.facts.progress.rank_progress import JobProgress, ProgressHistory
from traceml.diagnosis.facts.resource_use import ResourceUse, UseHistory
from traceml.diagnosis.facts.run_time import RunTime
from traceml.diagnosis.facts.sampled_lines import LazyLines, LineCounts, SampledLine
from traceml.diagnosis.facts.shared_batches import BatchHistory
from traceml.diagnosis.facts.skipped_steps import SkippedSteps
from traceml.diagnosis.facts.stopped_time import Stop, stop_of
from traceml.diagnosis.facts.topology.topology import Topology, TopologyHistory
from traceml.diagnosis.facts.trainings.trained_models import TrainedModels
from traceml.diagnosis.facts.worker_history import WorkerHistory

__all__ = ["OVERSUBSCRIBED", "JobFacts", "JobFactsBuilder", "LoaderFacts", "ModelFacts", "RankExit", "ended_badly"]

OVERSUBSCRIBED = 0.25
"""From this share of waiting for a CPU core, rules need stronger evidence to blame a rank or the network."""


@dataclass(frozen=True, kw_only=True)
class LoaderFacts:
    """A data loader, as the rank described it.

    Attributes:
        number: of the loader in its process, in the order of their first use; None where it is not known.
        objects: its data set's containers of many Python objects: path, type, count, and type `of` one object.
    """

    dataset: str | None = None
    length: int | None = None
    num_workers: int | None = None
    in_memory: bool | None = None
    batch_size: int | None = None
    pin_memory: bool | None = None
    persistent_workers: bool | None = None
    start_method: str | None = None
    number: int | None = None
    objects: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The trained model, as the rank described it."""

    model: str | None = None
    dtype: str | None = None
    device: str | None = None
    compiled: bool | None = None


@dataclass(frozen=True, kw_only=True)
class RankExit:
    """The end of a rank, usually a failure.

    Attributes:
        rank: the rank.
        state: finished, failed (exception or exit code), killed (signal), lost (gone without a message).
        code: exit code, signal: its number.
        exception: `Type: message` of the exception that ended the script.
        file, line, function: the user's code that raised it.
        last_step: last step that ended, open_phase: the phase that was open, open_step: its step.
        at_s: epoch seconds of the end, to separate the first from those that followed.
        stopped: whether its launcher ended it, because of others.
        process_gone: whether the process of a lost rank is known to have ended; else only its connection did.
        open_s: age of the open step at the end, seconds.
        saved_steps: steps in its last checkpoint; None where it saved none.
        scheduler: what the scheduler said of the job when it ended: `time_limit`, `preempted`, `warned`, `requeued`.
        host_lost: reason for which the launcher gave up its host.
        oom: where the kernel counted an out-of-memory kill meanwhile: `group`, the rank's control group, or `host`.
    """

    rank: int
    state: str = "finished"
    code: int | None = None
    signal: int | None = None
    exception: str | None = None
    file: str | None = None
    line: int | None = None
    function: str | None = None
    last_step: int | None = None
    open_phase: str | None = None
    open_step: int | None = None
    stack: str | None = None
    at_s: float | None = None
    host: str | None = None
    stopped: bool | None = None
    process_gone: bool | None = None
    open_s: float | None = None
    oom: str | None = None
    saved_steps: int | None = None
    scheduler: str | None = None
    host_lost: str | None = None

    @property
    def step(self) -> int | None:
        """The step in which it ended, or after which; None before the first."""
        return self.open_step if self.open_step is not None else self.last_step

    @property
    def steps(self) -> int:
        """Steps of a rank that has ended well: its end has closed the one that was open."""
        return max(-1 if step is None else step for step in (self.last_step, self.open_step)) + 1

    @classmethod
    def from_facts(cls, rank: int, state: str, reported: Mapping[str, Any], host: str | None = None) -> RankExit:
        """Return an exit from the facts of a stream, which the rank, its launcher and its flight file reported."""
        known = {name: reported[name] for name in _COPIED if reported.get(name) is not None}
        if known.get("exception") and reported.get("message"):
            known["exception"] = f"{known['exception']}: {reported['message']}"

        if known.get("signal"):
            known.pop("code", None)  # the exit code that the signal replaced

        if known.get("last_step", 0) < 0:
            del known["last_step"]  # it counts appended rows: there were none

        known.setdefault("open_step", reported.get("step"))
        return cls(rank=rank, state=state, host=host, **known)

    @property
    def interrupted(self) -> bool:
        """Whether the user ended it by Ctrl-C: by its signal, a shell's exit code for it, or the exception."""
        is_signal = SIGINT in (self.signal, (self.code or 0) - 128)
        return is_signal or (self.exception or "").startswith("KeyboardInterrupt")


@dataclass(frozen=True, kw_only=True)
class JobFacts:
    """Facts for the rules besides the window; each has a value that means "not known".

    Attributes:
        world_size: ranks of the run.
        group: whether the ranks share a process group; None if only the rows can tell.
        backend: the group's backend (gloo, nccl).
        hosts: rank -> host.
        cores: host -> cores that the job may use there.
        threads: torch threads per rank.
        main_wait: rank -> share of its main thread's ready time in which it waited for a core.
        core_wait: rank -> the same as a share of wall time in training.
        core_takers: cores that other processes on the host of rank 0 used meanwhile, by name, those that used most;
            '' are processes of other users.
        samples: use of cores, memory and devices over the run.
        model: the trained model.
        fused: whether the optimizer is a fused one; None where that is not known.
        detects_anomalies: whether autograd's detection of anomalies is on.
        collects: whether the script collects by its model what it trains on: rollouts of reinforcement learning.
        other_models: steps before which a model or optimizer of another size appeared, without the run's first ones.
        compile_s: seconds that torch.compile took; None where it is not known, as before the end.
        loader: the training data loader.
        loaders: rank -> its data loaders, in the order of their first use; of equal ones in a row the first.
        workers: worker processes of loaders over the run.
        lost_workers: rank -> loader workers that died, the first of them.
        growing: rank -> containers that grew while its memory did, at its last reading.
        exits: ends of ranks.
        ended_by: signal that the launcher received and that ended the job; None without one.
        job_end_s: epoch second at which the scheduler ends the job; None where it has no limit.
        limits: use of resources that have a limit.
        save_folders: rank -> folder into which it wrote checkpoints.
        memory: memory of ranks, devices and hosts over the run.
        lines: lines in which the training threads were seen.
        skipped: steps without an update.
        epochs: rows of `schema.EPOCHS` of the lowest rank: steps that waited for the first batch of an iterator.
        time: the run's wall time by part; None where it is not known.
        state: the run's state, as in the report.
        losses: losses that were read.
        batches: fingerprints of batches, and how ranks exchange gradients.
        latest: last step of each rank, -1 before the first.
        progress: progress of each rank; None where it is not known.
        pauses: times in which the training stood still for the interpreter or for torch.compile.
        stops: rank -> times in which its process did not run.
        turnover: device memory that ranks give back to the driver and request again.
        health: faults of devices.
        topology: place of each rank: host, switches, NVLink domain, coordinates of the device mesh.
    """

    world_size: int = 1
    group: bool | None = None
    backend: str | None = None
    hosts: Mapping[int, str] = field(default_factory=dict)
    cores: Mapping[str, int] = field(default_factory=dict)
    threads: int | None = None
    main_wait: Mapping[int, float] = field(default_factory=dict)
    core_wait: Mapping[int, float] = field(default_factory=dict)
    core_takers: Mapping[str, float] = field(default_factory=dict)
    samples: MachineSamples = field(default_factory=MachineSamples)
    model: ModelFacts | None = None
    fused: bool | None = None
    detects_anomalies: bool = False
    collects: bool = False
    other_models: tuple[int, ...] = ()
    compile_s: float | None = None
    loader: LoaderFacts | None = None
    loaders: Mapping[int, Sequence[LoaderFacts]] = field(default_factory=dict)
    workers: WorkerHistory = field(default_factory=WorkerHistory)
    lost_workers: Mapping[int, Sequence[LostWorker]] = field(default_factory=dict)
    growing: Mapping[int, Sequence[GrowingObjects]] = field(default_factory=dict)
    exits: tuple[RankExit, ...] = ()
    ended_by: EndingSignal | None = None
    job_end_s: float | None = None
    limits: tuple[ResourceUse, ...] = ()
    save_folders: Mapping[int, str] = field(default_factory=dict)
    memory: MemoryHistory = field(default_factory=MemoryHistory)
    lines: Sequence[SampledLine] = ()
    skipped: SkippedSteps | None = None
    epochs: NDArray[np.void] = field(default_factory=lambda: np.empty(0, EPOCHS.dtype))
    time: RunTime | None = None
    state: str = "running"
    losses: LossHistory | None = None
    batches: BatchHistory | None = None
    latest: tuple[int, ...] = ()
    progress: JobProgress | None = None
    pauses: PauseHistory = field(default_factory=PauseHistory)
    stops: Mapping[int, Sequence[Stop]] = field(default_factory=dict)
    turnover: TurnoverHistory = field(default_factory=TurnoverHistory)
    health: GpuHealthHistory = field(default_factory=GpuHealthHistory)
    topology: Topology = field(default_factory=Topology)

    def loader_of(self, rank: int, number: int) -> LoaderFacts | None:
        """Return a loader of a rank by its number; None where it is not known."""
        before = [each for each in self.loaders.get(rank, ()) if each.number is not None and each.number <= number]
        return before[-1] if before else None

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
        if len(ranks) == 1:  # as thousands are judged one by one
            return self._medians_of_core_wait.get(*ranks)

        late = set(ranks)
        others = [share for rank, share in self.core_wait.items() if rank not in late]
        return float(np.median(others)) if others else None

    @cached_property
    def _medians_of_core_wait(self) -> dict[int, float]:
        return medians_of_others(self.core_wait)

    @property
    def waited_share(self) -> float:
        """The same as a share of wall time, where that is known; else of ready time."""
        return float(np.median(list(self.core_wait.values()))) if self.core_wait else self.wait_share

    @property
    def oversubscribed(self) -> bool:
        """Whether the ranks had too few cores, so that lateness may be chance."""
        return self.wait_share >= OVERSUBSCRIBED

    @property
    def workers_busy(self) -> float | None:
        """Share of the time in which a loader worker computes; None where it is not known."""
        use = self.workers.use()
        return None if use is None else use.busy

    @cached_property
    def use(self) -> MachineUse:
        """Use of cores and devices during the training."""
        return self.samples.use()

    @property
    def others_cores(self) -> float | None:
        """Cores that programs beside the ranks used on the host of rank 0; None where that is not known."""
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


class JobFactsBuilder:
    """Collects facts from rows as they arrive.

    Attributes:
        accelerator: type of device of the models (cuda, mps), None where they are on the CPU.
    """

    def __init__(self, world_size: int = 1) -> None:
        self.world_size = world_size
        self.accelerator: str | None = None
        self.hosts: dict[int, str] = {}
        self.exits: dict[int, RankExit] = {}
        self.names: dict[int, dict[int, str]] = {}
        """Texts of each rank by id: names of user phases, sampled lines."""
        self.state = "running"
        self.ended_by: EndingSignal | None = None
        self.limits, self.lines, self.memory = UseHistory(), LineCounts(), MemoryHistory()
        self.workers = WorkerHistory()
        self.lost_workers: dict[int, list[LostWorker]] = {}
        self.save_folders: dict[int, str] = {}
        self.growing: dict[int, tuple[GrowingObjects, ...]] = {}
        self.skipped = SkippedSteps()
        self.steps_before: dict[int, int] = {}
        """Steps of each rank in the training that it resumes."""
        self.losses, self.batches = LossHistory(), BatchHistory()
        self.progress = ProgressHistory()
        self.pauses = PauseHistory(self.names)
        self.time: RunTime | None = None
        """Wall time by part, which a reader of the whole run sets."""
        self.turnover, self.health = TurnoverHistory(), GpuHealthHistory()
        self.topology = TopologyHistory()
        self.stops: dict[int, list[Stop]] = {}
        """Times in which a rank did not run."""
        self._epochs = np.empty(0, EPOCHS.dtype)
        self._epochs_rank: int | None = None
        self._core_rows: dict[int, int] = {}
        self._waits = CoreWaits()
        self.core_takers = CoreTakerHistory()
        """Other processes on the host of rank 0, seen while a rank waited for a core."""
        self.samples = MachineSamples()
        """Use of cores, memory and devices."""
        self._models = TrainedModels()
        self.loaders: dict[int, Sequence[LoaderFacts]] = {}
        self._loaders: list[LoaderFacts] = []
        self._training_loader: tuple[int, int] | None = None
        self._model: ModelFacts | None = None
        self._facts: dict[str, Any] = {}

    def host(self, rank: int, host: str) -> None:
        """Record the host of a rank."""
        self.hosts[rank] = host

    def info(self, rank: int, row: Mapping[str, Any]) -> None:
        """Take a row of the `info` log: loader, model, process, exit and resumed rows are used."""
        kind = row.get("kind")
        self.progress.info(rank, row)
        self.topology.info(rank, row)
        self._models.info(rank, row)
        if kind == "loader":
            # The training loader where it is known, else the first: evaluation comes later.
            self._loaders.insert(0 if row.get("training") else len(self._loaders), _loader(row))
            del self._loaders[_MAX_LOADERS:]
            self.loaders[rank] = [*self.loaders.get(rank, ()), _loader(row)][-_MAX_LOADERS:]
        elif kind == "training_loader" and isinstance(row.get("number"), int):
            self._training_loader = rank, row["number"]
        elif kind == "exit":
            reported = RankExit.from_facts(
                rank, "failed" if row.get("code") or row.get("exception") else "finished", row
            )
            # A rank reports how it is about to end; the fate of its process, where known, has priority.
            self.exits[rank] = _merge(reported, self.exits[rank]) if rank in self.exits else reported
        elif kind == "resumed" and isinstance(row.get("before"), int):
            self.steps_before[rank] = row["before"]
        elif kind == "stopped" and (stop := stop_of(row)) is not None:
            self.stops.setdefault(rank, []).append(stop)
        elif kind == "worker_lost" and (lost := lost_worker_of(row)) is not None:
            self.lost_workers[rank] = [*self.lost_workers.get(rank, []), lost][:_MAX_LOST]
        elif kind == "saves" and isinstance(row.get("folder"), str):
            self.save_folders[rank] = row["folder"]
        elif kind == "segments":
            self.turnover.add(rank, row)
        elif kind == "gpu_health":
            self.health.add(rank, row)
        elif kind == "growth":
            self.growing[rank] = growing_of(row)
        elif kind == "input":
            self.batches.input(rank, row)
        elif kind == "reductions":
            self.batches.reduction_facts(row)
        elif kind == "compilation":
            self._facts["compile_s"] = row.get("seconds")
        elif kind == "anomaly_detection":
            self._facts["detects_anomalies"] = bool(row.get("on"))
        elif kind == "rollouts":
            self._facts["collects"] = True
        elif kind in ("process", "model", "group", "optimizer"):
            self._facts.update({key: row[key] for key in _KEPT if row.get(key) is not None})
            device = str(row.get("device") or "cpu").partition(":")[0]
            self.accelerator = device if kind == "model" and device not in _NO_ACCELERATOR else self.accelerator
            if kind == "model" and (self._model is None or row.get("compiled")):
                self._model = ModelFacts(**{name: row.get(name) for name in ModelFacts.__dataclass_fields__})

            if kind == "model":
                self.batches.model(rank, row)
            elif kind == "group":
                self.batches.group_size = max(self.batches.group_size, int(row.get("group_size") or 0))

            if isinstance(row.get("machine_cores"), int):
                self.samples.machine_cores[rank] = row["machine_cores"]

            if isinstance(row.get("cores"), int):
                self._core_rows.setdefault(rank, row["cores"])

    def _progress(self) -> JobProgress | None:
        if self.state == "running" and not self.progress.has_snapshots:
            return None  # some rank makes progress

        opened = {
            rank: (end.open_step, end.open_s)
            for rank, end in self.exits.items()
            if end.open_step is not None and end.open_s is not None
        }
        ended = {rank: end.at_s for rank, end in self.exits.items()}
        return self.progress.build(self.hosts, self.names, ended, opened)

    @property
    def has_core_waits(self) -> bool:
        """Whether the main thread of any rank waits for a core for long."""
        return any(share >= OVERSUBSCRIBED for share in self._waits.of_ready_time().values())

    def join(self, rank: int) -> None:
        """Forget how an earlier process of a rank ended or stood still: another one has joined."""
        self.exits.pop(rank, None)
        self.progress.forget(rank)
        self.turnover.forget(rank)

    def host_rows(self, rank: int, rows: NDArray[np.void]) -> None:
        """Take rows of `schema.HOST`, sent by one rank per host."""
        if len(rows):
            self._core_rows[rank] = int(rows["cores"][-1])
            self.samples.add(HOST.name, rank, rows)
            self.memory.host_rows(rank, rows)

    def gpu_rows(self, rank: int, rows: NDArray[np.void]) -> None:
        """Take rows of `schema.GPU`."""
        self.samples.add(GPU.name, rank, rows)

    def epoch_rows(self, rank: int, rows: NDArray[np.void]) -> None:
        """Take rows of `schema.EPOCHS`; those of the lowest rank are kept, as all ranks begin epochs alike."""
        if self._epochs_rank is None or rank < self._epochs_rank:
            self._epochs_rank, self._epochs = rank, self._epochs[:0]

        if rank == self._epochs_rank:
            self._epochs = np.concatenate([self._epochs, rows])[-_MAX_EPOCHS:]

    def process_rows(self, rank: int, rows: NDArray[np.void]) -> None:
        """Take rows of `schema.PROCESS`, in order."""
        self._waits.add(rank, rows)
        self.samples.add(PROCESS.name, rank, rows)
        self.memory.process_rows(rank, rows)
        self.progress.process_rows(rank, rows)

    def worker_rows(self, rank: int, rows: NDArray[np.void]) -> None:
        """Take rows of `schema.LOADER_WORKERS`, in order."""
        self.workers.add(rank, rows)
        self.memory.worker_rows(rank, rows)

    def exit(self, ended: RankExit) -> None:
        """Record how a rank ended; facts that are missing here are kept from earlier reports."""
        before = self.exits.get(ended.rank)
        self.exits[ended.rank] = _merge(before, ended) if before else ended

    def build(self, latest: Sequence[int] = ()) -> JobFacts:
        """Return the facts as they are now.

        Args:
            latest: last step of each rank (-1: none), for ranks that could not report theirs.
        """
        cores = {self.hosts[rank]: count for rank, count in self._core_rows.items() if rank in self.hosts}
        known = self._facts
        facts = JobFacts(
            world_size=self.world_size,
            group=True if known.get("backend") else None,
            backend=known.get("backend"),
            hosts=dict(self.hosts),
            cores=cores,
            threads=known.get("torch_threads"),
            main_wait=self._waits.of_ready_time(),
            core_wait=self._waits.of_wall_time(),
            core_takers=self.core_takers.most(),
            samples=self.samples,
            model=self._model,
            fused=known.get("fused"),
            detects_anomalies=known.get("detects_anomalies", False),
            collects=known.get("collects", False),
            other_models=self._models.steps,
            compile_s=known.get("compile_s"),
            ended_by=self.ended_by,
            job_end_s=known.get("job_end_s"),
            loader=self._loaders[0] if self._loaders else None,
            loaders=dict(self.loaders),
            workers=self.workers,
            lost_workers=dict(self.lost_workers),
            growing=dict(self.growing),
            limits=self.limits.uses(),
            save_folders=dict(self.save_folders),
            memory=self.memory,
            lines=LazyLines(self.lines, self.names),
            skipped=self.skipped,
            losses=self.losses,
            batches=self.batches,
            latest=tuple(latest),
            progress=self._progress(),
            pauses=self.pauses,
            stops=dict(self.stops),
            turnover=self.turnover,
            health=self.health,
            topology=self.topology.build(self.hosts),
            epochs=self._epochs,
            time=self.time,
            exits=tuple(_with_last_step(self.exits[rank], latest) for rank in sorted(self.exits)),
            state=self.state,
        )
        trained = facts.loader_of(*self._training_loader) if self._training_loader is not None else None
        return facts if trained is None else replace(facts, loader=trained)


_KEPT = ("backend", "torch_threads", "fused", "job_end_s")
_NO_ACCELERATOR = ("cpu", "meta")
_MAX_LOADERS = _MAX_LOST = 64
_MAX_EPOCHS = 65_536
_LOADER_FIELDS = tuple(LoaderFacts.__dataclass_fields__)
_COPIED = tuple(name for name in RankExit.__dataclass_fields__ if name not in ("rank", "state", "host"))
_EXIT_FIELDS = tuple(name for name in RankExit.__dataclass_fields__ if name != "rank")


def _loader(row: Mapping[str, Any]) -> LoaderFacts:
    return LoaderFacts(**{name: row[name] for name in _LOADER_FIELDS if name in row})


def _merge(before: RankExit, after: RankExit) -> RankExit:
    newer = {name: getattr(after, name) for name in _EXIT_FIELDS}
    known = {name: getattr(before, name) if value is None else value for name, value in newer.items()}
    if known["signal"]:
        known["code"] = None

    return RankExit(rank=after.rank, **known)


def _with_last_step(ended: RankExit, latest: Sequence[int]) -> RankExit:
    if ended.last_step is not None or ended.rank >= len(latest) or latest[ended.rank] < 0:
        return ended

    return replace(ended, last_step=int(latest[ended.rank]))


def ended_badly(exits: Iterable[RankExit]) -> list[RankExit]:
    """Return the exits that are failures."""
    return [ended for ended in exits if ended.state in ("failed", "killed", "lost")]
