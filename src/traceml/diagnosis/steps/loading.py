"""Simulated data loading: step times with other numbers of loader workers, on the cores that there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import msgspec
import numpy as np
from msgspec.structs import replace

from traceml.database.schema import LINE_PHASES, LINE_WORKERS, Phase
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.facts.sampled_shares import (
    NAMED_SHARE,
    SampledShare,
    busy_share,
    handover_share,
    least_share,
    used_cores,
    workers_at_work,
)
from traceml.diagnosis.steps.aligned_steps import spread_ranges
from traceml.diagnosis.steps.own_work import OwnWork
from traceml.diagnosis.steps.step_split import Floats

__all__ = [
    "COUNTS", "IDLE_SHARE", "TAKE_NS", "Pipeline", "RareWaits", "fetch_cpu", "is_taken_ahead", "pipeline_of",
    "share_at_work", "share_of_long_waits",
]  # fmt: skip

TAKE_NS = 3e5
"""Time that the training process usually takes to receive a batch from a worker, at least."""
RECEIVE_TENSOR_NS, RECEIVE_BYTE_NS = 3e5, 0.35
"""CPU time that it takes for each tensor, whose memory it asks the worker for, and for mapping each byte."""
SHARE_TENSOR_NS, SHARE_BYTE_NS = 4e5, 1.0
"""CPU time by which a batch takes a worker longer than the training process: it puts each tensor into shared memory."""
ENOUGH = 0.95
"""More workers are not advised if they shorten the step by less than this factor."""
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Numbers of workers that are tried."""
RARE_WAITS = 0.6
"""With n workers, one step in n waits for all of them; waits in less than this share of such steps are pauses."""
PREFETCH = 2
"""Batches that each worker has in advance by default (prefetch_factor): a slow one is waited for beyond these."""
MAX_PREFETCH = 32
"""No larger prefetch_factor is advised: each worker would hold as many batches in memory."""
MIN_WORKERS_NS = 5e8
"""Less time of making batches does not tell how much of it is CPU time."""
MOSTLY_HANDOVER = 0.5
"""The wait for workers is one for receiving batches if this share of it would end with that."""
_MAX_BATCHES, _BLOCK = 2048, 256  # that are simulated: of more, blocks that are spread over them
_LONG_WAIT = 3.0
_MIN_EPOCH = 4.0  # steps of an epoch, to tell its first one apart
_MIN_TAKEN = 8.0  # batches that are taken at once, at least
_ASKS = 2.5  # steps of an epoch that ask for batches, where it takes all at once, or ends its iterator in another one
_HELD_SHARE = 0.8
_MIN_READY = 0.05
_ALL_THE_TIME = 0.9
IDLE_SHARE = 0.3
"""Workers that make batches for less of the time keep up."""


class Pipeline(msgspec.Struct, frozen=True, kw_only=True):
    """A training step, and the making of its batch in this process or in workers."""

    fetch_ns: float  # wall time that one process takes for the data of a step
    fetch_cpu: float  # cores that it uses: less than 1 where it waits, also; 1 where that is not known
    is_cpu_known: bool = True  # whether it is
    rest_ns: float  # wall time of the step without waiting for data
    wait_ns: float = np.inf  # how long the step waits for data now: no advice gains more than all of it
    rest_cores: float = 1.0  # mean number of cores that the training process uses meanwhile
    cores: int | None = None  # cores of a rank; None if unknown
    workers: int = 0  # loader workers now; 0 if the training process fetches by itself
    worker_cores: int | None = None  # cores that all workers together may use, where these are fewer; else None
    take_ns: float = TAKE_NS  # time that the training process takes to receive a batch from a worker
    # time that a worker would take in addition to make a batch that the training process can receive; 0 if that is in
    # `fetch_ns`, as there are workers now
    share_ns: float = 0.0
    is_handover: bool = False  # whether it waits for that, and not for the workers to make batches
    # Mean number of steps of an epoch; None if unknown. Workers make the first batch of an epoch only when
    # the training asks for it.
    epoch_steps: float | None = None
    # how much longer than `fetch_ns` the first batch of an epoch takes, as to fill a shuffle buffer
    first_ns: float = 0.0
    lost_ns: float = 0.0  # time of a step that another cause takes, which is not in the others: it stays
    # how long batches take, in their order, by `fetch_ns`: single slow ones and slow parts of an epoch are waited for
    batches: tuple[float, ...] = ()
    # whether each worker reads a part of an iterable data set: then all have their slow batches together
    is_divided: bool = False
    is_taken_ahead: bool = False  # whether the training takes all batches of an epoch before its first step

    def step_ns(self, workers: int) -> float:
        """Return the step time with this many workers: that of the training, of the workers, or of the cores."""
        if not workers:
            return self.rest_ns + self.fetch_ns + self.first_wait_ns

        slowest = max(self._bound_ns(workers), self._in_turn_ns(workers))
        if self.epoch_steps is None:
            return slowest

        first = self.rest_ns + self.take_ns + self.share_ns + self.fetch_ns + self.first_ns
        return slowest + max(first - slowest, 0.0) / self.epoch_steps

    def _bound_ns(self, workers: int) -> float:
        """Return the step time where all batches take equally long."""
        fetch_ns = self.fetch_ns
        slowest = max(self.rest_ns + self.take_ns, (fetch_ns + self.share_ns) / workers)
        if self.worker_cores:
            slowest = max(slowest, fetch_ns * self.fetch_cpu / self.worker_cores)

        if self.cores:
            added_ns = self.share_ns and self.share_ns + self.take_ns  # else they are in the others
            computed_ns = self.rest_ns * self.rest_cores + fetch_ns * self.fetch_cpu + added_ns
            slowest = max(slowest, computed_ns / self.cores)

        return slowest

    def _in_turn_ns(self, workers: int) -> float:
        """Return the step time where workers make the batches in turn, and the training takes them in order.

        As torch's loader does, each worker has its next batches ordered as soon as the training takes an earlier one.
        """
        made = np.repeat(self.batches, workers)[: len(self.batches)] if self.is_divided else np.array(self.batches)
        ready: list[float] = []  # when each batch is
        asked: list[float] = []  # when the training came for it, and had it
        now = 0.0
        for number, fetch_ns in enumerate((made * self.fetch_ns + self.share_ns).tolist()):
            ordered = asked[number - PREFETCH * workers] if number >= PREFETCH * workers else 0.0
            ready.append(max(ordered, ready[number - workers] if number >= workers else 0.0) + fetch_ns)
            now = max(now + self.take_ns, ready[-1])
            asked.append(now)
            now += self.rest_ns

        return (now - ready[0]) / len(ready) if ready else 0.0

    def best_workers(self) -> int:
        """Return the smallest number of workers that gives nearly the shortest step, of those that find a core."""
        most = self.cores / min(self.fetch_cpu, 1.0) if self.cores and self.fetch_cpu else COUNTS[-1]
        times = {count: self.step_ns(count) for count in COUNTS if count <= max(most, 1)}
        return min(count for count, time in times.items() if ENOUGH * time <= min(times.values()))

    def gain_with(self, fetch_share: float, workers: int | None = None) -> float:
        """Return old / new step time if fetching took this share of its time.

        Args:
            fetch_share: new / old time of a batch.
            workers: number of workers then; None for that of now.
        """
        return self.gain(workers, fetch_ns=self.fetch_ns * fetch_share, first_ns=self.first_ns * fetch_share)

    def gain(self, workers: int | None = None, **changed: float | None) -> float:
        """Return old / new step time with this many workers, or those of now, if some of the fields were others."""
        new_ns = replace(self, **changed).step_ns(self.workers if workers is None else workers)
        most = 1.0 + self.wait_ns / (self.rest_ns + self.lost_ns)
        return min((self.step_ns(self.workers) + self.lost_ns) / (new_ns + self.lost_ns), most)

    @property
    def first_wait_ns(self) -> float:
        """Mean time of a step by which the first batches of epochs take longer."""
        return self.first_ns / self.epoch_steps if self.epoch_steps else 0.0

    @property
    def takes_cpu(self) -> bool:
        """Whether a fetch computes more than it waits."""
        return self.fetch_cpu >= 0.5


def pipeline_of(work: OwnWork, facts: JobFacts, wait_ns: float, step_ns: float = 0.0) -> Pipeline | None:
    """Return the loading of a window; None if the waits are pauses, which show nothing of a usual batch.

    Args:
        step_ns: mean step of the run, if other causes have been taken away in the window.
    """
    workers = facts.loader_workers
    pauses = share_of_long_waits(work) if workers else None
    if pauses is not None and pauses < RARE_WAITS / workers and not _make_all_the_time(facts):
        return None

    rest_ns = max(work.step_ns - wait_ns, 1.0)
    cores = facts.cores_per_rank
    use = facts.worker_use if workers else None
    bound = use is not None and use.cores < min(workers, cores or 1)
    handover = bool(workers) and (handover_share(facts.lines) >= NAMED_SHARE or _are_idle(facts))
    epoch_steps, is_ahead = _epoch_steps(facts), is_taken_ahead(work, facts)
    first_ns = 0.0 if workers or is_ahead else _first_ns(facts, wait_ns)
    if workers:
        # Share of a fetch in which a worker computes, or waits for a core.
        sampled = busy_share(facts.worker_lines, LINE_PHASES[LINE_WORKERS], MIN_WORKERS_NS)
        is_known = use is not None or sampled is not None
        fetch_ns, computes = _fetch_of_workers(facts, work.step_ns, sampled, bound=bound, handover=handover)
    else:
        own = fetch_cpu(facts)
        is_known = own is not None
        fetch_ns = max(wait_ns - first_ns / (epoch_steps or 1.0), 0.0)
        computes = 1.0 if own is None else max(own, _least_cpu(work, facts, fetch_ns))

    taken_ns = max(wait_ns * handover_share(facts.lines), TAKE_NS)  # by the samples of a process that waits for a batch
    take_ns, share_ns = (taken_ns, 0.0) if workers else _handover_ns(facts)
    rest_cores = _rest_cores(work, facts, rest_ns, 0.0 if workers else fetch_ns * computes)
    if workers and cores:
        free_ns = max(cores * work.step_ns - rest_ns * rest_cores, 0.0)
        fetch_ns, computes = _within_cores(fetch_ns, computes, free_ns)

    makes_itself = not workers and not is_ahead
    waits = _waits(work, epoch_steps if first_ns else None)
    made = Pipeline(
        fetch_ns=fetch_ns,
        fetch_cpu=computes,
        is_cpu_known=is_known,
        rest_ns=rest_ns,
        wait_ns=wait_ns,
        rest_cores=rest_cores,
        cores=cores,
        workers=workers,
        worker_cores=use.cores if use is not None and bound else None,
        take_ns=wait_ns if handover else take_ns,
        share_ns=share_ns,
        is_handover=handover,
        epoch_steps=epoch_steps,
        first_ns=first_ns,
        lost_ns=max(step_ns - work.step_ns, 0.0),
        batches=_by_mean(waits) if makes_itself else (),
        is_divided=facts.loader is not None and facts.loader.is_undivided,
        is_taken_ahead=is_ahead,
    )
    # A worker that computes in Python answers late, and its next batch is late, too: then that is the cause.
    ready = replace(made, take_ns=TAKE_NS, is_handover=False)
    saved_ns = made.step_ns(workers) - ready.step_ns(workers)
    return ready if handover and share_at_work(facts) is not None and saved_ns < MOSTLY_HANDOVER * wait_ns else made


def _handover_ns(facts: JobFacts) -> tuple[float, float]:
    """Return how long the training process would take to receive the data of a step, and workers to share it."""
    tensors, size = facts.batch_tensors, facts.batch_bytes
    receive_ns = max(tensors * RECEIVE_TENSOR_NS + size * RECEIVE_BYTE_NS, TAKE_NS)
    share_ns = tensors * SHARE_TENSOR_NS + size * SHARE_BYTE_NS
    return facts.micro_batches * receive_ns, facts.micro_batches * share_ns


def share_at_work(facts: JobFacts) -> float | None:
    """Return the share of their time in which workers make batches; None if unknown.

    They compute or are runnable, or were seen in a fetch, which may wait for a disk or a server.
    """
    sampled, use = workers_at_work(facts.worker_lines), facts.worker_use
    shares = [sampled.share] if _is_known(sampled) else []
    return max(shares if use is None else [*shares, use.ready], default=None)


def _are_idle(facts: JobFacts) -> bool:
    """Return whether workers were seen to make no batches for most of the time: each batch is ready in time."""
    at_work = share_at_work(facts)
    return _is_known(workers_at_work(facts.worker_lines)) and at_work is not None and at_work < IDLE_SHARE


def _is_known(at_work: SampledShare) -> bool:
    """Return whether the share at work is known; few samples suffice to show that workers are idle."""
    if not at_work.is_rough:
        return True

    idle = (1 - at_work.share) * at_work.samples
    return at_work.samples > 0 and least_share(idle, at_work.samples) >= 1 - IDLE_SHARE


def _make_all_the_time(facts: JobFacts) -> bool:
    """Return whether workers were seen to make batches nearly all the time: they are too few, whoever waits when.

    A loop that reads several loaders, by chance or in turns, waits for the slow one in few steps. Workers that a slow
    sample holds up are idle meanwhile, but for one.
    """
    at_work = workers_at_work(facts.worker_lines)
    return not at_work.is_rough and at_work.share >= _ALL_THE_TIME


def _fetch_of_workers(
    facts: JobFacts, step_ns: float, sampled: float | None, *, bound: bool, handover: bool
) -> tuple[float, float]:
    """Return how long a worker takes for a batch, and the share of it in which it computes, or waits for a core.

    Args:
        sampled: that share by the samples of the workers, for where their use is not known.
        bound: whether the workers may use fewer cores than they are.
        handover: whether the training receives batches that are ready.
    """
    workers, use, sampled = facts.loader_workers, facts.worker_use, 1.0 if sampled is None else sampled
    seen = workers_at_work(facts.worker_lines)
    # What workers use includes the thread that hands batches over, which is most of it for one of many tensors.
    at_work = seen.share if _is_known(seen) else share_at_work(facts)
    if at_work is not None and handover:  # they wait for orders in between
        computes = at_work * sampled if use is None else use.ready
        return workers * step_ns * at_work, min(computes / max(at_work, _MIN_READY), 1.0)

    # Each makes batches all the time, as the training waits for them.
    if use is not None and bound:  # unbound, it would wait for a core no longer than the training does
        share = (1.0 - use.waited) / max(1.0 - min(facts.wait_share, use.waited), _MIN_READY)
        return workers * step_ns * share, use.busy / max(1.0 - use.waited, _MIN_READY)

    return workers * step_ns, sampled if use is None else use.ready


def _within_cores(fetch_ns: float, computes: float, free_ns: float) -> tuple[float, float]:
    """Return a fetch without its waiting for cores, of which it used at most `free_ns`, and the share that computes."""
    used = min(computes, free_ns / fetch_ns)
    share = 1.0 - computes + used
    return fetch_ns * share, used / max(share, _MIN_READY)


def _by_mean(waits: Floats) -> tuple[float, ...]:
    """Return how long batches take by their mean, in order; of many, those in parts of the window."""
    waits = spread_ranges(waits, _MAX_BATCHES, _BLOCK)
    return tuple((waits / max(float(waits.mean()), 1.0)).tolist())


def _waits(work: OwnWork, epoch_steps: float | None) -> Floats:
    """Return the waits for batches in order, without those for the first one of each epoch if it takes longer.

    Args:
        epoch_steps: steps of an epoch, if the first one's batch takes longer: the longest waits are these.
    """
    waits = work.parts["input_wait"].mean(axis=0)
    firsts = 0 if epoch_steps is None else round(len(waits) / epoch_steps)
    return np.delete(waits, np.argsort(waits)[len(waits) - firsts :])


def _epoch_steps(facts: JobFacts) -> float | None:
    """Return the mean number of steps of an epoch, by the steps that wait for the first batch of one.

    Loaders that are read in turns all begin in the first steps: what follows until the last step counts, too.
    """
    starts = facts.epochs["step"]
    if len(starts) < 2:
        return None

    between = (int(starts[-1]) - int(starts[0])) / (len(starts) - 1)
    until_now = (facts.last_step + 1 - int(starts[0])) / len(starts)
    return max(between, until_now, 1.0)


def _first_ns(facts: JobFacts, wait_ns: float) -> float:
    """Return how much longer than the others the first batch of an epoch takes; 0 if it is about as long."""
    epoch_steps, first_ns = _epoch_steps(facts), _first_wait_ns(facts)
    if epoch_steps is None or epoch_steps < _MIN_EPOCH or not first_ns:
        return 0.0

    usual_ns = max(wait_ns - first_ns / epoch_steps, 0.0) / (1 - 1 / epoch_steps)
    return first_ns - usual_ns if first_ns > _LONG_WAIT * usual_ns else 0.0


def _first_wait_ns(facts: JobFacts) -> float:
    """Return how long the first batch of an epoch is waited for, after that of the process; 0 without any."""
    later = facts.epochs[facts.epochs["first"] == 0]
    return float(later["ns"].mean()) if len(later) else 0.0


def is_taken_ahead(work: OwnWork, facts: JobFacts) -> bool:
    """Return whether the script takes all batches of an epoch at once: the other steps ask for none."""
    epoch_steps = _epoch_steps(facts)
    if epoch_steps is None or epoch_steps < _MIN_TAKEN:
        return False

    asks = (work.parts["input_wait"] > 0).mean(axis=0)
    return float(asks.mean()) * epoch_steps <= _ASKS


class RareWaits(msgspec.Struct, frozen=True, kw_only=True):
    """Waits for workers that are in few steps."""

    first_share: float  # share of the waiting that is for the first batch of an epoch
    are_whole_epochs: bool  # whether each of them is for all batches of an epoch
    gain_with_overlap: float  # old / new step time if the workers made the same batches during the other steps
    prefetch_factor: int | None  # batches per worker that cover such a wait; None if they would fill the memory
    # batches of an epoch, if such a wait is as long as half of it takes to train: nobody is ahead of that
    short_epoch: int | None = None

    @property
    def are_for_samples(self) -> bool:
        """Whether most are for some batches that take long, not for the first one or all of an epoch."""
        return not self.are_whole_epochs and self.first_share < NAMED_SHARE

    @classmethod
    def of(cls, work: OwnWork, facts: JobFacts) -> Self:
        """Return those of a window."""
        waits = work.parts["input_wait"].mean(axis=0)
        wait_ns, step_ns = float(waits.mean()), work.step_ns
        rest_ns = max(step_ns - wait_ns, 1.0)
        long_ns = float(waits[waits > _LONG_WAIT * wait_ns].mean())
        ahead = (facts.loader.prefetch_factor if facts.loader else None) or PREFETCH
        factor = ahead + int(np.ceil(long_ns / (rest_ns * max(facts.loader_workers, 1))))
        epoch_steps = _epoch_steps(facts) or np.inf
        return cls(
            first_share=_first_wait_ns(facts) / epoch_steps / max(wait_ns, 1.0),
            are_whole_epochs=is_taken_ahead(work, facts),
            gain_with_overlap=step_ns / max(rest_ns, wait_ns, _cores_ns(work, facts, rest_ns, wait_ns)),
            prefetch_factor=factor if factor <= MAX_PREFETCH else None,
            short_epoch=round(epoch_steps * facts.micro_batches) if 2 * long_ns >= epoch_steps * rest_ns else None,
        )


def _cores_ns(work: OwnWork, facts: JobFacts, rest_ns: float, wait_ns: float) -> float:
    """Return how long the cores of a rank take for a step and its batch, which workers make; 0 without their number.

    Where the use of the workers is not known, they are taken to compute while the training waits.
    """
    use, cores = facts.worker_use, facts.cores_per_rank
    made_ns = wait_ns if use is None else work.step_ns * use.ready
    return (rest_ns + facts.loader_workers * made_ns) / cores if cores else 0.0


def share_of_long_waits(work: OwnWork) -> float | None:
    """Return the share of steps that have nearly all of the waiting for data, if they wait far longer than the mean."""
    per_step = work.parts["input_wait"].mean(axis=0)
    long = per_step > _LONG_WAIT * float(per_step.mean())
    held = float(per_step[long].sum()) / max(float(per_step.sum()), 1.0)
    return float(long.mean()) if held >= _HELD_SHARE else None


def fetch_cpu(
    facts: JobFacts, lines: Sequence[SampledLine] | None = None, part: str = Phase.INPUT_WAIT.label
) -> float | None:
    """Return the share of a fetch by the training thread in which it computes, or waits for a core to do so.

    It is more than 1 where threads of a library compute on several cores.

    Args:
        lines: samples of the fetch, by default those of the training.
        part: their part.
    """
    used = used_cores(facts.lines if lines is None else lines, part)
    return None if used is None else max(used, min(used / max(1.0 - facts.wait_share, _MIN_READY), 1.0))


def _least_cpu(work: OwnWork, facts: JobFacts, fetch_ns: float) -> float:
    """Return the share of a fetch in which its thread ran or waited for a core at least, by the kernel's counts.

    Of fetches that are over in milliseconds, samples watch only those that lost their core.
    """
    return max(1.0 - facts.asleep_share * work.step_ns / max(fetch_ns, 1.0), 0.0)


def _rest_cores(work: OwnWork, facts: JobFacts, rest_ns: float, fetch_cpu_ns: float) -> float:
    busy = facts.use.busy_cores
    if busy is None:
        return 1.0

    wanted = busy / max(1.0 - facts.waited_share, _MIN_READY)  # with a core whenever it is ready
    cores = max((wanted * work.step_ns - fetch_cpu_ns) / rest_ns, 0.0)
    # A short run's mean has the CPU time of its start and of other threads in it.
    return min(cores, max(facts.threads, 1)) if facts.threads else cores
