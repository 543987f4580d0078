"""Collection of the facts of a job from rows, as they arrive."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any, ClassVar

import numpy as np
from msgspec.structs import asdict, replace
from numpy.typing import NDArray

from traceml.database.info_kinds import InfoKind
from traceml.database.row_arrays import join_rows
from traceml.database.schema import EPOCHS, GPU, HOST, PROCESS
from traceml.database.states import RunStatus
from traceml.diagnosis.facts.core_waits import CompetingProcessHistory, CoreWaits
from traceml.diagnosis.facts.device_events import GpuHealthHistory, TurnoverHistory
from traceml.diagnosis.facts.ends import EndingSignal, LostWorker, RankExit, lost_worker_of, merged_exits
from traceml.diagnosis.facts.growing_objects import GrowingObjects, growing_of
from traceml.diagnosis.facts.job_facts import OVERSUBSCRIBED, JobFacts
from traceml.diagnosis.facts.machine_use import MachineSamples
from traceml.diagnosis.facts.memory_growth import MemoryHistory
from traceml.diagnosis.facts.numerics import LossHistory, SkippedSteps
from traceml.diagnosis.facts.pauses import PauseHistory
from traceml.diagnosis.facts.progress.rank_progress import JobProgress, ProgressHistory
from traceml.diagnosis.facts.resource_use import UseHistory
from traceml.diagnosis.facts.run_time import RunTime
from traceml.diagnosis.facts.sampled_lines import MAX_LOADERS, LazyLines, LazyWorkerLines, LineCounts
from traceml.diagnosis.facts.shared_batches import BatchHistory
from traceml.diagnosis.facts.topology import Topology
from traceml.diagnosis.facts.trainings.models_and_loaders import (
    EvaluationModeSteps,
    LoaderFacts,
    ModelFacts,
    TrainedModels,
    UnchangedParameters,
    is_first_trained,
)
from traceml.diagnosis.facts.trainings.step_numbers import StepNumbers
from traceml.diagnosis.facts.wall_parts import Stop, stop_of
from traceml.diagnosis.facts.wall_time import WallTimeFacts
from traceml.diagnosis.facts.worker_history import WorkerHistory

__all__ = ["JobFactsBuilder"]

_KEPT = {name: name for name in ("fused", "job_end_s", "job_limit_s", "store_restarts")} | {"torch_threads": "threads"}
_NO_ACCELERATOR = ("cpu", "meta")
_MAX_LOST = 64
_MAX_EPOCHS = 65_536
_LOADER_FIELDS = tuple(LoaderFacts.__struct_fields__)
_OF_SETUP = (InfoKind.PROCESS, InfoKind.MODEL, InfoKind.GROUP, InfoKind.OPTIMIZER)
# Fields of `JobFacts` that the builder has under the same name: as they are, and as copies.
_SHARED = (
    "world_size", "state", "time", "accelerator", "ended_by", "samples", "workers", "batches", "losses", "skipped",
    "pauses", "memory", "turnover", "health", "topology", "epochs",
)  # fmt: skip
_COPIED = (
    "hosts", "loaders", "lost_workers", "growing", "save_folders", "stops", "joined", "bound_cores",
    "unchanged_weights",
)  # fmt: skip


class JobFactsBuilder:
    """Collects facts from rows as they arrive; see `JobFacts` for what they are."""

    def __init__(self, world_size: int = 1) -> None:
        self.world_size = world_size
        self.accelerator: str | None = None
        self.hosts: dict[int, str] = {}
        self.exits: dict[int, RankExit] = {}
        self.names: dict[int, dict[int, str]] = {}  # texts of each rank by id: names of user phases, sampled lines
        self.state = "running"
        self.ended_by: EndingSignal | None = None
        self.limits, self.lines, self.memory = UseHistory(), LineCounts(self.names), MemoryHistory()
        self.workers = WorkerHistory()
        self.lost_workers: dict[int, list[LostWorker]] = {}
        self.save_folders: dict[int, str] = {}
        self.growing: dict[int, tuple[GrowingObjects, ...]] = {}
        self.skipped = SkippedSteps()
        self.numbers = StepNumbers()  # numbers of the steps, as the script has given them
        self.resumes_at = 0  # steps in the checkpoint that this attempt has read, whatever its ranks count
        self.losses, self.batches = LossHistory(), BatchHistory()
        self.progress = ProgressHistory()
        self.pauses = PauseHistory(self.names, self.numbers)
        self.time: RunTime | None = None  # wall time by part, which a reader of the whole run sets
        self.turnover, self.health = TurnoverHistory(), GpuHealthHistory()
        self.topology = Topology(hosts=self.hosts)
        self.stops: dict[int, list[Stop]] = {}
        self.joined: dict[int, list[int]] = {}
        self.epochs = np.empty(0, EPOCHS.dtype)
        self._epochs_rank: int | None = None
        self._core_rows: dict[int, int] = {}
        self.bound_cores: dict[int, frozenset[int]] = {}
        self.unchanged_weights: dict[int, UnchangedParameters] = {}
        self._waits = CoreWaits()
        self.competing_processes = CompetingProcessHistory()
        """Other processes on the host of rank 0, seen while a rank waited for a core."""
        self.samples = MachineSamples()
        self._models = TrainedModels()
        self.loaders: dict[int, Sequence[LoaderFacts]] = {}
        self._loaders: list[LoaderFacts] = []
        self._training_loader: tuple[int, int] | None = None
        self._loaders_made: dict[tuple[Any, ...], int] = {}
        self._worker_samples: dict[tuple[int, int], list[int]] = {}  # by rank and number of the loader
        self._model: ModelFacts | None = None
        self._read_first: set[int] = set()  # ranks that read a checkpoint before their first step
        self._facts: dict[str, Any] = {}  # fields of `JobFacts` that single rows give

    def host(self, rank: int, host: str) -> None:
        """Record the host of a rank."""
        self.hosts[rank] = host

    def info(self, rank: int, row: Mapping[str, Any]) -> None:
        """Take a row of the `info` log, by its kind."""
        self.progress.info(rank, row)
        self.topology.info(rank, row)
        self._models.info(rank, row)
        kind = row.get("kind")
        if kind in _OF_SETUP:
            self._take_setup(rank, row)

        take = self._BY_KIND.get(kind) if isinstance(kind, str) else None
        if take is not None:
            take(self, rank, row)

    def _take_loader(self, rank: int, row: Mapping[str, Any]) -> None:
        # The training loader where it is known, else the first: evaluation comes later.
        self._loaders.insert(0 if row.get("training") else len(self._loaders), _loader(row))
        del self._loaders[MAX_LOADERS:]
        self.loaders[rank] = [*self.loaders.get(rank, ()), _loader(row)][-MAX_LOADERS:]

    def _take_loaders_made(self, _rank: int, row: Mapping[str, Any]) -> None:
        if isinstance(row.get("made"), int):
            self._loaders_made[_loader(row).signature] = row["made"]

    def _take_training_loader(self, rank: int, row: Mapping[str, Any]) -> None:
        if isinstance(row.get("number"), int):
            self._training_loader = rank, row["number"]

    def _take_worker_samples(self, rank: int, row: Mapping[str, Any]) -> None:
        samples = row.get("samples")
        if isinstance(row.get("number"), int) and isinstance(samples, list) and all(map(_is_count, samples)):
            self._worker_samples[rank, row["number"]] = samples

    def _take_batch(self, _rank: int, row: Mapping[str, Any]) -> None:
        for name, field in (("tensors", "batch_tensors"), ("bytes", "batch_bytes")):
            if isinstance(row.get(name), int):
                self._facts[field] = max(row[name], self._facts.get(field, 0))

    def _take_copies(self, _rank: int, row: Mapping[str, Any]) -> None:
        self._facts |= {f"{name}_share": row.get(name) for name in ("pinned", "non_blocking")}

    def _take_input(self, rank: int, row: Mapping[str, Any]) -> None:
        self.batches.input(rank, row)
        self._facts["autocast"], self._facts["tf32"] = bool(row.get("autocast")), bool(row.get("tf32"))

    def _take_exit(self, rank: int, row: Mapping[str, Any]) -> None:
        reported = RankExit.from_facts(rank, "failed" if row.get("code") or row.get("exception") else "finished", row)
        # A rank reports how it is about to end; the fate of its process, where known, has priority. A script that ended
        # well says nothing of its process, which may stay for a thread or a function that is called at the end.
        if rank in self.exits:
            self.exits[rank] = merged_exits(reported, self.exits[rank])
        elif reported.state != "finished":
            self.exits[rank] = reported

    def _take_joined(self, rank: int, row: Mapping[str, Any]) -> None:
        if isinstance(row.get("step"), int):
            self.joined.setdefault(rank, []).append(row["step"])

    def _take_profiler(self, _rank: int, row: Mapping[str, Any]) -> None:
        self._facts["profiles"] = bool(row.get("on")) and self._facts.get("profiles", True)

    def _take_stopped(self, rank: int, row: Mapping[str, Any]) -> None:
        if (stop := stop_of(row)) is not None:
            self.stops.setdefault(rank, []).append(stop)

    def _take_lost_worker(self, rank: int, row: Mapping[str, Any]) -> None:
        if (lost := lost_worker_of(row)) is not None:
            self.lost_workers[rank] = [*self.lost_workers.get(rank, []), lost][:_MAX_LOST]

    def _take_saves(self, rank: int, row: Mapping[str, Any]) -> None:
        if isinstance(row.get("folder"), str):
            self.save_folders[rank] = row["folder"]

    def _take_process(self, _rank: int, row: Mapping[str, Any]) -> None:
        if row.get("tracing") is False:
            self._facts["only_logs"] = True

    def _take_model(self, rank: int, row: Mapping[str, Any]) -> None:
        device = str(row.get("device") or "cpu").partition(":")[0]
        self.accelerator = device if device not in _NO_ACCELERATOR else self.accelerator
        known = None if self._model is None else asdict(self._model)
        if is_first_trained(known, row) or row.get("compiled"):
            self._model = ModelFacts(**{name: row.get(name) for name in ModelFacts.__struct_fields__})

        if isinstance(bound := row.get("bound_cores"), list):
            self.bound_cores[rank] = frozenset(each for each in bound if isinstance(each, int))

        self.batches.model(rank, row)

    def _take_same_order(self, _rank: int, row: Mapping[str, Any]) -> None:
        if isinstance(row.get("number"), int):
            self._facts["same_order"] = self._facts.get("same_order", frozenset()) | {row["number"]}

    def _take_evaluation_mode(self, _rank: int, row: Mapping[str, Any]) -> None:
        found: dict[str, Any] = {name: row.get(name) for name in EvaluationModeSteps.__struct_fields__}
        known = self._facts.get("evaluation_mode")
        if None not in found.values() and (known is None or found["steps"] > known.steps):
            found["layers"] = [str(each) for each in row["layers"]]
            self._facts["evaluation_mode"] = EvaluationModeSteps(**found)

    def _take_unchanged_weights(self, rank: int, row: Mapping[str, Any]) -> None:
        found: dict[str, Any] = {name: row.get(name) for name in UnchangedParameters.__struct_fields__}
        if None in found.values():
            return

        self.unchanged_weights.pop(rank, None)
        if found["optimizer"]:
            self.unchanged_weights[rank] = UnchangedParameters(**found | {"stepped": bool(found["stepped"])})

    def _take_own_update(self, _rank: int, row: Mapping[str, Any]) -> None:
        place = str(row.get("file")), str(row.get("function"))
        self._facts["own_updates"] = self._facts.get("own_updates", frozenset()) | {place}

    def _take_optimizer(self, _rank: int, row: Mapping[str, Any]) -> None:
        if isinstance(row.get("history_bytes"), int):
            self._facts["history_bytes"] = max(self._facts.get("history_bytes", 0), row["history_bytes"])

    def _take_setup(self, rank: int, row: Mapping[str, Any]) -> None:
        self._facts |= {field: row[key] for key, field in _KEPT.items() if row.get(key) is not None}
        if isinstance(row.get("machine_cores"), int):
            self.samples.machine_cores[rank] = row["machine_cores"]

        if isinstance(row.get("cores"), int):
            self._core_rows.setdefault(rank, row["cores"])

    _BY_KIND: ClassVar[Mapping[str, Callable[[JobFactsBuilder, int, Mapping[str, Any]], None]]] = {
        InfoKind.LOADER: _take_loader,
        InfoKind.LOADERS_MADE: _take_loaders_made,
        InfoKind.TRAINING_LOADER: _take_training_loader,
        InfoKind.WORKER_SAMPLES: _take_worker_samples,
        InfoKind.EXIT: _take_exit,
        InfoKind.RESUMED: lambda self, rank, row: self.numbers.take(rank, row),
        InfoKind.LOADED: lambda self, rank, _: self._read_first.add(rank),
        InfoKind.STOPPED: _take_stopped,
        InfoKind.JOINED: _take_joined,
        InfoKind.WORKER_LOST: _take_lost_worker,
        InfoKind.SAVES: _take_saves,
        InfoKind.SEGMENTS: lambda self, rank, row: self.turnover.add(rank, row),
        InfoKind.GPU_HEALTH: lambda self, rank, row: self.health.add(rank, row),
        InfoKind.GROWTH: lambda self, rank, row: self.growing.update({rank: growing_of(row)}),
        InfoKind.BATCH: _take_batch,
        InfoKind.INPUT: _take_input,
        InfoKind.COPIES: _take_copies,
        InfoKind.REDUCTIONS: lambda self, _, row: self.batches.reduction_facts(row),
        InfoKind.COLLECTIVES: lambda self, rank, row: self.batches.collective(rank, row),
        InfoKind.COMPILATION: lambda self, _, row: self._facts.update(compile_s=row.get("seconds")),
        InfoKind.ANOMALY_DETECTION: lambda self, _, row: self._facts.update(detects_anomalies=bool(row.get("on"))),
        InfoKind.EVALUATION_MODE: _take_evaluation_mode,
        InfoKind.KEPT_GRADIENTS: lambda self, _, row: self._facts.update(keeps_gradients=row.get("optimizer")),
        InfoKind.UNCHANGED_WEIGHTS: _take_unchanged_weights,
        InfoKind.PROFILER: _take_profiler,
        InfoKind.ROLLOUTS: lambda self, *_: self._facts.update(collects=True),
        InfoKind.RPC: lambda self, *_: self._facts.update(rpc=True),
        InfoKind.PLAYS: lambda self, *_: self._facts.update(plays=True),
        InfoKind.SAME_ORDER: _take_same_order,
        InfoKind.OWN_UPDATE: _take_own_update,
        InfoKind.PLAIN_EVALUATION: lambda self, *_: self._facts.update(plain_evaluation=True),
        InfoKind.EVALUATES_GRADIENTS: lambda self, *_: self._facts.update(evaluates_gradients=True),
        InfoKind.LAUNCHES: lambda self, *_: self._facts.update(launches=True),
        InfoKind.SINGLE_CALLS: lambda self, _, row: self._facts.update(single_calls=row.get("calls") or 0),
        InfoKind.UNREAD_SKIPS: lambda self, *_: self._facts.update(unread_skips=True),
        InfoKind.PROCESS: _take_process,
        InfoKind.TRACING: lambda self, *_: self._facts.update(only_logs=False),
        InfoKind.OPTIMIZER: _take_optimizer,
        InfoKind.MODEL: _take_model,
        InfoKind.GROUP: lambda self, _, row: self.batches.group.group(row),
    }

    def _progress(self) -> JobProgress | None:
        if self.state == RunStatus.RUNNING and not self.progress.has_snapshots:
            return None  # some rank makes progress

        opened = {
            rank: (end.open_step, end.open_s)
            for rank, end in self.exits.items()
            if end.open_step is not None and end.open_s is not None
        }
        ended = {rank: end.gone_s for rank, end in self.exits.items()}
        return self.progress.build(self.hosts, self.names, ended, opened)

    @property
    def waits_for_core_in_step(self) -> int:
        """The newest open step, if the main thread of any rank waits for a core for long; -1 if none does."""
        waits = any(share >= OVERSUBSCRIBED for share in self._waits.of_ready_time().values())
        return self._waits.open_step if waits else -1

    def join(self, rank: int) -> None:
        """Forget how an earlier process of a rank ended, or that it made no progress: another one has joined."""
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
            self._epochs_rank, self.epochs = rank, self.epochs[:0]

        if rank == self._epochs_rank:
            self.epochs = join_rows([self.epochs, rows])[-_MAX_EPOCHS:]

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
        self.exits[ended.rank] = merged_exits(before, ended) if before else ended

    @property
    def counted_before(self) -> int:
        """Steps of the training before those of this attempt, where its ranks count from 0."""
        return 0 if self.numbers.is_given() else self.resumes_at

    @property
    def is_grouped(self) -> bool:
        """Whether the ranks are known to have made a process group."""
        return self.batches.group.size > 1

    @property
    def only_logs(self) -> bool:
        """Whether the script logs values and is not traced."""
        return bool(self._facts.get("only_logs", False))

    def for_wall_time(self, ranks: Collection[int]) -> WallTimeFacts:
        """Return what the division of the run's wall time depends on."""
        return WallTimeFacts(
            stops=self.stops,
            compile_s={rank: self.pauses.set_up_compile_s(rank) for rank in ranks},
            early_compile_s={rank: self.pauses.early_compile_s(rank) for rank in ranks},
            grouped=self.is_grouped,
            untraced=self.only_logs,
            open_parts={rank: part for rank in ranks if (part := self.progress.open_part(rank)) is not None},
        )

    def build(self, latest: Sequence[int] = (), ends_ns: Sequence[int] = ()) -> JobFacts:
        """Return the facts as they are now.

        Args:
            latest: last step of each rank (-1: none), for ranks that could not report theirs.
            ends_ns: end of that step by the rank's clock (0: none).
        """
        cores = {self.hosts[rank]: count for rank, count in self._core_rows.items() if rank in self.hosts}
        startup_run_s, startup_wait_s = self._waits.of_start_up_s()
        shared: dict[str, Any] = {name: getattr(self, name) for name in _SHARED}
        shared |= {name: dict(getattr(self, name)) for name in _COPIED} | self._facts
        facts = JobFacts(
            resumes_at=self.counted_before,
            first_step=self.numbers.first,
            cores=cores,
            wait_of_ready_time=self._waits.of_ready_time(),
            wait_of_wall_time=self._waits.of_wall_time(),
            core_wait_s=self._waits.observed_s(),
            startup_wait_s=startup_wait_s,
            startup_run_s=startup_run_s,
            competing_processes=self.competing_processes.others,
            started_processes=self.competing_processes.started,
            model=self._model or ModelFacts(),
            backend=self.batches.group.backends.get(self.accelerator or "cpu"),
            other_models=self._models.steps,
            same_models=self._models.returns,
            trainings_begin=self._models.begins,
            loader=self._loaders[0] if self._loaders else None,
            limits=self.limits.uses(),
            lines=LazyLines(self.lines, ends_ns, has_ended=self.state != RunStatus.RUNNING),
            thread_lines=self.lines.of_other_threads(),
            lines_of_workers=LazyWorkerLines(self.lines),
            divided_lines=partial(self.lines.divided, latest, ends_ns),
            lines_apart=partial(self.lines.apart_from, latest, ends_ns),
            latest=tuple(latest),
            progress=self._progress(),
            read_micro_batches=lambda: self.progress.micro_batches,
            exits=tuple(self._ended(rank, latest) for rank in sorted(self.exits)),
            **shared,
        )
        trained = facts.loader_of(*self._training_loader) if self._training_loader is not None else None
        loader = facts.loader if trained is None else trained
        if loader is None:
            return facts

        made = self._loaders_made.get(loader.signature, loader.made)
        return replace(facts, loader=replace(loader, made=made, worker_samples=self._samples_of(loader, facts)))

    def _samples_of(self, loader: LoaderFacts, facts: JobFacts) -> tuple[int, ...]:
        """Return how often each worker of loaders like this one was seen to make a batch."""
        like = (
            samples
            for place, samples in self._worker_samples.items()
            if (other := facts.loader_of(*place)) is not None and other.signature == loader.signature
        )
        return tuple(map(sum, zip_longest(*like, fillvalue=0)))

    def _ended(self, rank: int, latest: Sequence[int]) -> RankExit:
        is_new = rank in self._read_first and not self.numbers.is_given(rank) and not self.resumes_at
        return replace(self.exits[rank].with_last_step(latest), untraced=self.only_logs, counts_anew=is_new)


def _loader(row: Mapping[str, Any]) -> LoaderFacts:
    known = {name: row[name] for name in _LOADER_FIELDS if row.get(name) is not None}
    return LoaderFacts(**{**known, "objects": tuple(filter(_is_held, known.get("objects", ())))})


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def _is_held(described: Any) -> bool:
    is_named = isinstance(described, Mapping) and described.keys() >= {"path", "type", "of"}
    return is_named and isinstance(described.get("count"), int)
