"""Shares of a phase's samples by what they show: imports, waiting, torch's own work, loader workers.

A module is imported once, mostly in the first steps, which are not judged. So imports inside steps do not count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from math import sqrt

import msgspec
from msgspec.structs import replace

from traceml.database.schema import IMPORTING, LINE_PHASES, LINE_WORKERS, Phase
from traceml.diagnosis.facts.sampled_lines import OUTSIDE_STEPS, SampledLine
from traceml.formatting import percent_text

__all__ = [
    "MIN_SAMPLES", "MIN_SHARE_SAMPLES", "NAMED_SHARE", "SampledShare", "broadcasts_buffers", "busy_share",
    "child_wait_share", "clearing_share", "counted_lines", "dataset_share", "environment_share", "fusable_share",
    "handover_share", "import_share", "is_import", "is_loss", "is_passing", "iterator_share", "least_share",
    "library_share", "lock_share", "loss_share", "number_share", "of_part", "ordering_share", "place_share", "receives",
    "thread_wait_share", "unpickling_share", "used_cores", "worker_wait_share", "workers_at_work",
]  # fmt: skip

MIN_SHARE_SAMPLES = 35
"""Fewer samples of a phase do not give a share in percent: with 35, a share of 0.9 is accurate to a tenth."""
MIN_SAMPLES = 10
"""Fewer samples of a phase do not name a line."""
NAMED_SHARE = 0.5
"""A function with a smaller share of the phase is not named."""

_CHILD_ANSWER = "/multiprocessing/connection.py:"
_ENVIRONMENTS = re.compile(r"/(gymnasium|gym|pettingzoo|dm_control|ale_py|mujoco|vec_env|envs?)/")
_CLEARS = re.compile(r"\bzero_grad$", re.MULTILINE)
_LOSSES = re.compile(r"(^|/)torch/nn/functional\.py:\d+ (\w*cross_entropy\w*|\w+_loss|kl_div)$")
_OPTIMIZERS = re.compile(r"(^|/)torch/optim/")
_FUSABLE = re.compile(r"(^|/)torch/optim/(adam|adamw|sgd|adagrad|optimizer)\.py:")
_ORDERS = re.compile(r"Sampler\.__iter__$")
_LOCKS = re.compile(r"(^|/)(multiprocessing/synchronize\.py:\d+ SemLock\.__enter__$|filelock/)")
_NUMBERS = re.compile(r"(^|/)torch/utils/data/_utils/collate\.py:\d+ collate_(float|int|numpy_scalar)_fn$")
_RECEIVES = re.compile(r" (_PollLikeSelector\.select|Connection\._recv(_bytes)?|recvfds)$")
_TAKES = re.compile(r" Connection\._recv(_bytes)?$")
_UNPICKLES = re.compile(r"(^|/)multiprocessing/queues\.py:\d+ Queue\.get$")
_HANDS_OVER = re.compile(
    r" (Connection\._(recv|send)(_bytes)?|SocketClient|socket\.\w+|recvfds|_?rebuild_\w+|Queue\.get)$"
)
_BUFFERS = re.compile(r"(^|/)torch/nn/parallel/distributed\.py:\d+ \w+\._(\w*broadcast_coalesced|sync\w*buffers)$")
_AWAITS_THREAD = re.compile(r"(^|/)threading\.py:\d+ ")
_AWAITS = re.compile(r" (_PollLikeSelector\.select|Connection\._poll|wait)$")
_MIN_CLEARING = 5  # it only lowers a cost
_Z_SCORE = 1.645  # a share is below its bound in one of twenty cases
_WATCHED_NS = 20e6  # a phase that was watched for less tells nothing about its CPU time


class SampledShare(msgspec.Struct, frozen=True):
    """A share of a number of samples, 0..1."""

    share: float
    samples: int

    @property
    def is_rough(self) -> bool:
        """Whether there are too few samples for a share in percent."""
        return self.samples < MIN_SHARE_SAMPLES

    @property
    def is_most(self) -> bool:
        """Whether it is half or more; of few samples, certainly."""
        if self.samples < MIN_SAMPLES:
            return False

        share = least_share(self.share * self.samples, self.samples) if self.is_rough else self.share
        return share >= NAMED_SHARE

    @property
    def text(self) -> str:
        """The share in words: `all`, `94 %`, or `most` where the samples are few."""
        if self.is_rough:
            return "most"

        return "all" if self.share > 0.99 else percent_text(self.share)


def import_share(lines: Sequence[SampledLine], part: str) -> SampledShare:
    """Return the share of a part's samples in which modules were imported."""
    return _sampled_share(lines, part, is_import)


def child_wait_share(lines: Sequence[SampledLine]) -> SampledShare:
    """Return the share of the start-up's samples that wait for an answer of a child process.

    Loader workers do not count: their batches come through a queue.
    """
    return _sampled_share(lines, "startup", lambda each: _CHILD_ANSWER in (each.library or ""))


def thread_wait_share(lines: Sequence[SampledLine], parts: Collection[str]) -> float:
    """Return the share of some parts' samples that wait for another thread of the script; 0 if unknown."""
    return library_share([each for part in parts for each in of_part(lines, part)], _AWAITS_THREAD) or 0.0


def broadcasts_buffers(lines: Sequence[SampledLine]) -> bool:
    """Return whether communication that is called from Python is mostly DDP's broadcast of the model's buffers."""
    return (library_share(of_part(lines, Phase.COMM.label), _BUFFERS) or 0.0) >= NAMED_SHARE


def library_share(seen: Sequence[SampledLine], libraries: re.Pattern[str], fewest: int = MIN_SAMPLES) -> float | None:
    """Return the share of samples in functions of some libraries; None if they are fewer than `fewest`."""
    total = sum(each.samples for each in seen)
    return _samples_in(seen, libraries) / max(total, 1) if total >= fewest else None


def _sampled_share(lines: Sequence[SampledLine], part: str, chosen: Callable[[SampledLine], object]) -> SampledShare:
    seen = of_part(lines, part)
    total = sum(each.samples for each in seen)
    return SampledShare(sum(each.samples for each in seen if chosen(each)) / max(total, 1), total)


def _share(
    lines: Sequence[SampledLine], part: str, chosen: Callable[[SampledLine], object], fewest: int = MIN_SAMPLES
) -> float | None:
    """Return the share of a part's samples that are chosen; None if the part has fewer samples than `fewest`."""
    found = _sampled_share(lines, part, chosen)
    return found.share if found.samples >= fewest else None


def environment_share(lines: Sequence[SampledLine], part: str) -> float | None:
    """Return the share of a part's samples in libraries of simulated environments; None if there are few samples."""
    return library_share(of_part(lines, part), _ENVIRONMENTS)


def fusable_share(lines: Sequence[SampledLine]) -> float | None:
    """Return the share of torch's optimizers that have a fused form, by samples; None if there are few samples."""
    seen = [each for each in of_part(lines, "optimizer") if _OPTIMIZERS.search(each.library or "")]
    return library_share(seen, _FUSABLE)


def busy_share(lines: Sequence[SampledLine], part: str, least_ns: float = _WATCHED_NS) -> float | None:
    """Return the share of a part's time in which its thread was on a core; None if unknown.

    Args:
        part: a phase of the training thread, or that of the workers, whose waiting for a core counts, too.
        least_ns: a part that was watched for less tells nothing about its CPU time.
    """
    used = used_cores(lines, part, least_ns)
    return None if used is None else min(used, 1.0)


def used_cores(lines: Sequence[SampledLine], part: str, least_ns: float = _WATCHED_NS) -> float | None:
    """Return how many cores a part used in the mean, as `busy_share`; more than one with threads of a library."""
    seen = of_part(lines, part)
    watched = sum(each.watched_ns for each in seen)
    return sum(each.cpu_ns for each in seen) / watched if watched >= least_ns else None


def clearing_share(lines: Sequence[SampledLine]) -> float:
    """Return the share of `other` in which gradients are cleared (`zero_grad`), by samples; 0 if unknown.

    Freeing large gradients takes time, and is not the work of the user's loop.
    """
    return _share(lines, "other", _clears, _MIN_CLEARING) or 0.0


def loss_share(lines: Sequence[SampledLine]) -> float:
    """Return the share of `other` in torch's functions for losses, by samples; 0 if unknown.

    They are computation as the forward is, of which they are a part where the loss is a module.
    """
    return _share(lines, "other", is_loss, _MIN_CLEARING) or 0.0


def counted_lines(lines: Sequence[SampledLine]) -> tuple[SampledLine, ...]:
    """Return samples with those of `clearing_share` and `loss_share` in the phases they belong to, not in `other`."""
    return tuple(_counted(each) if each.part == "other" else each for each in lines)


def _counted(line: SampledLine) -> SampledLine:
    if _clears(line):
        return replace(line, part=Phase.OPTIMIZER.label)

    return replace(line, part=Phase.FORWARD.label) if is_loss(line) else line


def _clears(line: SampledLine) -> bool:
    return _CLEARS.search(f"{line.function}\n{line.library}") is not None


def is_loss(line: SampledLine) -> bool:
    """Return whether it is in one of torch's functions for a loss."""
    return _LOSSES.search(line.library or "") is not None


def place_share(lines: Sequence[SampledLine], places: Collection[tuple[str, str]]) -> float | None:
    """Return the share of `other` in some functions, by file and name; None if there are few samples."""
    return _share(lines, "other", lambda each: (each.file, each.function) in places)


def ordering_share(lines: Sequence[SampledLine]) -> float:
    """Return the share of the waiting for data in which torch's samplers draw an order, by samples; 0 if unknown."""
    return library_share(of_part(lines, Phase.INPUT_WAIT.label), _ORDERS) or 0.0


def number_share(lines: Sequence[SampledLine]) -> float:
    """Return the share of making batches in which a loader makes tensors of single numbers; 0 if unknown.

    Args:
        lines: samples of the training thread, or of the loader's workers if it has some.
    """
    return library_share(_making(lines), _NUMBERS) or 0.0


def lock_share(lines: Sequence[SampledLine]) -> float:
    """Return the share of the time in which loader workers make batches that they wait for each other's lock.

    0 if unknown, and for a queue, behind whose lock one of them waits for what another process sends.
    """
    seen = _making(lines)
    return 0.0 if _samples_in(seen, _TAKES) else library_share(seen, _LOCKS) or 0.0


def _making(lines: Sequence[SampledLine]) -> list[SampledLine]:
    """Return the samples in which batches are made, by the training process or by workers that are not idle."""
    parts = (Phase.INPUT_WAIT.label, LINE_PHASES[LINE_WORKERS])
    return [each for each in lines if each.part in parts and not each.is_idle and not is_passing(each)]


def worker_wait_share(lines: Sequence[SampledLine], part: str = Phase.INPUT_WAIT.label) -> float:
    """Return the share of the waiting for data that is receiving from loader workers, by samples; 0 if unknown."""
    return library_share(of_part(lines, part), _RECEIVES) or 0.0


def dataset_share(lines: Sequence[SampledLine], dataset: str) -> float:
    """Return the share of the waiting for data in the functions of a data set's class, by samples; 0 if unknown."""
    return _share(lines, Phase.INPUT_WAIT.label, lambda each: f".{dataset}." in f".{each.function or ''}") or 0.0


def handover_share(lines: Sequence[SampledLine]) -> float:
    """Return the share of the waiting for loader workers in which a batch is there and is taken over; 0 if unknown.

    The training process asks the worker for the memory of each tensor; it waits for a batch elsewhere.
    """
    seen = of_part(lines, Phase.INPUT_WAIT.label)
    taking, waiting = _samples_in(seen, _HANDS_OVER), _samples_in(seen, _AWAITS)
    return taking / (taking + waiting) if taking + waiting >= MIN_SAMPLES else 0.0


def unpickling_share(lines: Sequence[SampledLine]) -> float:
    """Return the share of taking batches over in which Python objects are unpickled, and no tensors; 0 if unknown."""
    seen = of_part(lines, Phase.INPUT_WAIT.label)
    taking = _samples_in(seen, _HANDS_OVER)
    return _samples_in(seen, _UNPICKLES) / taking if taking >= MIN_SAMPLES else 0.0


def iterator_share(lines: Sequence[SampledLine]) -> float:
    """Return the share of `other` that is waiting for an iterator that is not a DataLoader, by samples; 0 if unknown.

    Its time is measured as `other`, and its samples are those of `input_wait`.
    """
    waiting = sum(each.samples for each in of_part(lines, Phase.INPUT_WAIT.label))
    total = waiting + sum(each.samples for each in of_part(lines, "other"))
    return waiting / total if total >= MIN_SHARE_SAMPLES else 0.0


def workers_at_work(lines: Sequence[SampledLine]) -> SampledShare:
    """Return the share of the time in which loader workers make batches."""
    return _sampled_share(lines, LINE_PHASES[LINE_WORKERS], lambda each: not each.is_idle)


def receives(line: SampledLine) -> bool:
    """Return whether a batch of a loader worker is received, or waited for: the work is in the worker's process."""
    return line.part == Phase.INPUT_WAIT.label and _RECEIVES.search(line.library or "") is not None


def _samples_in(lines: Iterable[SampledLine], libraries: re.Pattern[str]) -> int:
    """Return the samples in functions of some libraries."""
    return sum(each.samples for each in lines if each.library and libraries.search(each.library))


def least_share(samples: float, whole: float) -> float:
    """Return the lower bound of a share at a confidence of 95 % (Wilson's score)."""
    share, spread = samples / whole, _Z_SCORE**2 / whole
    error = sqrt(share * (1 - share) * spread + spread**2 / 4)
    return (share + spread / 2 - error) / (1 + spread)


def of_part(lines: Iterable[SampledLine], part: str) -> list[SampledLine]:
    """Return the lines of a part that count."""
    return [each for each in lines if each.part == part and not is_passing(each)]


def is_passing(line: SampledLine) -> bool:
    """Return whether modules were imported inside a step."""
    return line.part not in OUTSIDE_STEPS and is_import(line)


def is_import(line: SampledLine) -> bool:
    """Return whether a module was imported."""
    return (line.library or "").startswith(IMPORTING)
