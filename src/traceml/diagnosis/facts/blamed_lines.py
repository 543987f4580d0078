"""Lines that a phase is spent in, as far as its samples show.

Shares of phases come from the hooks; samples only divide a phase by line. Code that holds the GIL is sampled less than
it runs. So a function is named only if its share of all samples explains half of the phase's measured share, and if the
phase does not have more samples than its share: that would mean that code elsewhere is hidden from samples.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

from traceml.database.schema import LINE_PHASES, LINE_STARTUP, LINE_THREADS, LINE_WORKERS, PHASE_LABELS, Phase
from traceml.diagnosis.facts.sampled_lines import OUTSIDE_STEPS, SampledLine
from traceml.diagnosis.facts.sampled_shares import (
    MIN_SAMPLES,
    MIN_SHARE_SAMPLES,
    NAMED_SHARE,
    SampledShare,
    busy_share,
    is_import,
    is_loss,
    is_passing,
    least_share,
    library_share,
    of_part,
    receives,
    workers_at_work,
)
from traceml.formatting import line_text

__all__ = [
    "AUTOGRAD", "AWAITS_ANSWERS", "COLLECTIVES", "DEEP_COPIES", "LOADERS", "PICKLING", "PROCESSES", "PROGRAMS", "TORCH",
    "WAITS_FOR_OTHERS", "WITHOUT_MODELS", "BlamedLine", "awaits_others", "blamed_line", "called_share", "calls_code",
    "calls_model", "calls_trainer", "changed_line", "computes_loss", "importing_line", "is_of_loop", "is_of_model",
    "is_of_ranks_alone", "is_waiting", "leading_lines", "line_beside_imports", "line_of_ranks_alone",
    "line_without_hidden", "lines_of_ranks_alone", "main_library", "main_line_share", "of_longest_startup",
    "outside_line", "own_line", "own_line_share", "runs_forward", "threads_line", "unless_trainer", "workers_line",
]  # fmt: skip

LEADING_RATIO = 2.0
"""From `MIN_SHARE_SAMPLES` on, a function is also named if it has half of a phase, and this many times any other."""
MAX_EXCESS = 0.15
"""The phase's share of the samples may exceed its share of the hooks' time by this much."""
NAMED_OF_EXCESS = 0.3
"""`NAMED_SHARE` of late ranks, beyond what the others do: the phase has other work on all ranks."""
HIDDEN_RATIO = 0.8
"""If a phase has fewer of its samples than this, the share of a line is said to be the least."""
OWN_LINE_RATIO = 12
"""A line is of some ranks alone if they are seen in it this many times as often as the others, with one more sample."""

MAIN_LINE_SHARE = 0.8
"""In a training loop a line with less of a part is told with the lines around it."""

_USER = Phase.USER.label
_MODULE = "<module>"
_SECOND_SHARE = 0.1  # of a phase, for the second of two functions
_CALLS_MODEL = 0.1  # of the time of code that is in forward, or a model is called by chance
_SEEN_SHARE = 0.05  # less may be another call in a function of that name
_FEW_SAMPLES = 3
_OTHER_PHASES = frozenset(each.label for each in Phase) - {Phase.BACKWARD.label, _USER}
_OWN_SHARE = 0.1  # of a line without a function of a library: it does something itself
_WAITS = 0.5  # code that is on a core for less of its time
_AS_LONG = 0.8  # ranks with this share of the longest start-up begin at about the same time
_ASLEEP = 0.25  # then the thread must be asleep for this share of the function's time at least
_CONTENDED, _HARDLY_RUNS = 0.25, 0.1
AWAITS_ANSWERS = ("Connection._recv", "Connection._recv_bytes")
"""Library functions that wait for what another process sends,"""
WAITS_FOR_OTHERS = (*AWAITS_ANSWERS, "Condition.wait", "Queue.get", "wait")
"""or for another thread or process."""

_Place = tuple[str, str, int | None]
"""File and function; the lines of a module have nothing in common, so each is a place of its own."""


class LibraryCode(NamedTuple):
    """Functions of libraries that a function of the user may call."""

    names: re.Pattern[str]  # `FILE:LINE FUNCTION`
    least: float = NAMED_SHARE  # share of the samples of a function that calls them


TORCH = LibraryCode(
    re.compile(r"(^|/)torch/(?!_tensor_str\.py|_tensor\.py:\d+ Tensor\.__(format|repr)__)")  # these make texts
)
AUTOGRAD = LibraryCode(re.compile(r"(^|/)torch/autograd/(graph|__init__)\.py:"), _SEEN_SHARE)
"""The engine of backward, which a hook that runs in it does not call."""
LOADERS = LibraryCode(re.compile(r"(^|/)torch/utils/data/"))
"""Loaders, whose code in torch makes the batches."""
PROGRAMS = LibraryCode(re.compile(r"(^|/)subprocess\.py:"))
"""The waiting for a program that was started."""
PROCESSES = LibraryCode(re.compile(r"(^|/)multiprocessing/popen_fork\.py:"))
"""The waiting in `Process.join`, of each way of starting one."""
DEEP_COPIES = LibraryCode(
    re.compile(r"(^|/)(copy\.py:|torch/\S+ \w+\.(__deepcopy__|_deepcopy)|torch/storage\.py:\d+ )")
)
"""Copies of whole objects, as of a model."""
COLLECTIVES = LibraryCode(re.compile(r"(^|/)torch/distributed/(distributed_c10d|rendezvous)\.py:"))
"""Collectives, and the making of process groups."""
PICKLING = LibraryCode(
    re.compile(r"(^|/)torch/distributed/distributed_c10d\.py:\d+ (_object_to_tensor|_tensor_to_object)$"), _SEEN_SHARE
)
"""Collectives of Python objects, which are pickled."""
WITHOUT_MODELS = LibraryCode(
    re.compile(r"(^|/)((numpy|scipy|pandas|PIL|cv2|matplotlib|torchvision/transforms)/|tokenization_\w+\.py:)")
)
"""Libraries that do not run the model."""


class BlamedLine(msgspec.Struct, frozen=True):
    """The function that holds most of a phase, with its main line; of a module's own code the line.

    The main line is the most frequent one; of late ranks, the one that they are in more often than the others.
    """

    file: str
    line: int
    function: str
    share: float  # share of the phase that it has at least, 0..1
    samples: int
    is_least: bool = False  # whether it may have clearly more, as a part of the phase was hidden from samples
    of_workers: bool = False  # whether it is of the time in which loader workers make batches, and not of a phase
    lines: tuple[int, int] | None = None  # first and last line that have most of it; None: the main line, or a function

    @property
    def place(self) -> str:
        """The line in words: `train.py:23 update_metric`; of a training loop also where in it: `(lines 20-24)`."""
        return line_text(self.file, self.line, self.function, self.lines)

    @property
    def share_text(self) -> str:
        """The share of the phase in words: `all`, `94 %`, `at least 60 %`, or `most` where the samples are few."""
        return ("at least " if self.is_least and not self.is_rough else "") + SampledShare(
            self.share, self.samples
        ).text

    @property
    def is_rough(self) -> bool:
        """Whether there are too few samples for a share in percent."""
        return SampledShare(self.share, self.samples).is_rough

    @property
    def is_module(self) -> bool:
        """Whether the function is the forward of a module, and no other one that a module or a hook calls."""
        return self.function.endswith(".forward")

    @property
    def of_it(self) -> str:
        """The line as the end of a clause about the phase: `, 94 % of it in train.py:23 update_metric`."""
        return f", {self.share_text} of it in {self.place}"

    @property
    def also(self) -> str:
        """The end of that clause for a second line: ` and 22 % in train.py:31 log`."""
        return f" and {self.share_text} in {self.place}"

    def is_function_of(self, seen: SampledLine) -> bool:
        """Return whether a sample is in its function."""
        return (seen.file, seen.function) == (self.file, self.function)

    def is_line_of(self, seen: SampledLine) -> bool:
        """Return whether a sample is in its main line."""
        return (seen.file, seen.line) == (self.file, self.line)

    def of_batches(self, workers: int, whose: str = "the") -> str:
        """Return a clause on loader workers: `; of the time in which the workers make batches, 94 % is in …`."""
        who = f"{whose} worker makes" if workers == 1 else f"{whose} workers make"
        return f"; of the time in which {who} batches, {self.share_text} is in {self.place}"

    def evidence(self, phase_share: float) -> dict[str, Any]:
        """Return the line as a finding's evidence; with few samples there is no `line_share`."""
        share = {} if self.is_rough else {"line_share": self.share * phase_share}
        lines = {"lines": list(self.lines)} if self.lines else {}
        return {"file": self.file, "line": self.line, "function": self.function, **lines, **share}


def blamed_line(
    lines: Sequence[SampledLine],
    part: str,
    phase_share: float,
    ranks: Collection[int] = (),
    others: Collection[int] = (),
    waiting: float = 0.0,
) -> BlamedLine | None:
    """Return the function that most of a phase is spent in; None if the samples do not show one.

    Args:
        part: a phase, `other`, or a user's phase by its name.
        phase_share: the phase's share of the step, as measured by the hooks.
        ranks: the ranks to look at; empty for all.
        others: ranks to compare with: what they do too is not to blame.
        waiting: share of the step that these ranks wait for others inside the phase, which is none of it for the hooks.
    """
    usual = tuple(_seen_on(lines, others)) if others else ()
    return changed_line(tuple(_seen_on(lines, ranks)), part, phase_share, usual, pace=1.0, waiting=waiting)


def changed_line(
    lines: Sequence[SampledLine],
    part: str,
    phase_share: float,
    usual: Sequence[SampledLine],
    pace: float,
    waiting: float = 0.0,
) -> BlamedLine | None:
    """Return the function by which a phase takes longer in some steps; None if the samples do not show one.

    Args:
        lines: samples of the slow steps.
        phase_share: the phase's share of them, as measured by the hooks.
        usual: samples of the other steps; without any, the function that most of the phase is spent in is returned.
        pace: how long a usual step takes, in slow steps.
        waiting: as of `blamed_line`.
    """
    code = part if part in PHASE_LABELS or part == "other" else _USER
    functions, total, in_steps = _by_function(lines, code)
    if total < MIN_SAMPLES or total / in_steps > phase_share + waiting + MAX_EXCESS:
        return None

    expected, _, in_usual_steps = _by_function(usual, code)
    scale = pace * in_steps / max(in_usual_steps, 1)
    excess = {place: samples - expected[place] * scale for place, samples in functions.items()}
    place = max(excess, key=lambda name: excess[name], default=None)
    whole = max(total - waiting * in_steps, phase_share * in_steps)
    if place is None or not _is_named(functions, place, whole, excess[place] if usual else None):
        return None

    own, common = _by_line(lines, code, place), _by_line(usual, code, place)
    line = max(own, key=lambda number: own[number] - common[number] * scale)
    share, within = min(functions[place] / whole, 1.0), _within_loop(lines, place, own, line)
    return BlamedLine(place[0], line, place[1], share, total, total < HIDDEN_RATIO * whole, lines=within)


def own_line_share(lines: Sequence[SampledLine], part: str, ranks: Collection[int], others: Collection[int]) -> float:
    """Return the share of the step that some ranks spend in a line of a phase that the other ranks hardly run.

    It is that of the most frequent such line; 0 if there is none. Ranks that only lack a core run the lines that
    the others run.
    """
    (mine, in_steps), (usual, in_steps_of_others) = (_by_place(lines, part, some) for some in (ranks, others))
    scale = in_steps / max(in_steps_of_others, 1)
    alone = [samples for place, samples in mine.items() if _is_alone(samples, usual[place], scale)]
    return max(alone, default=0) / max(in_steps, 1)


def is_of_ranks_alone(lines: Sequence[SampledLine], part: str, line: BlamedLine, ranks: Collection[int]) -> bool:
    """Return whether the other ranks hardly run a function in a phase; False if they have too few samples."""
    others = [each for each in lines if each.rank not in ranks]
    in_steps, in_steps_of_others = (_by_function(some, part)[2] for some in (_seen_on(lines, ranks), others))
    mine, usual = (sum(each.samples for each in _seen_in(some, part, line)) for some in (lines, others))
    scale = in_steps / max(in_steps_of_others, 1)
    return in_steps_of_others >= MIN_SAMPLES and _is_alone(mine - usual, usual, scale)


def lines_of_ranks_alone(
    lines: Sequence[SampledLine], part: str, phase_share: float, ranks: Collection[int]
) -> tuple[BlamedLine, ...]:
    """Return the two functions that most of a phase of some ranks is spent in together, if no other rank runs them.

    Empty if the samples show no two that count.
    """
    two = leading_lines(tuple(_seen_on(lines, ranks)), part, phase_share)
    is_known = all(each.share >= _SECOND_SHARE and is_of_ranks_alone(lines, part, each, ranks) for each in two)
    return two if is_known else ()


def line_of_ranks_alone(
    lines: Sequence[SampledLine], part: str, phase_share: float, ranks: Collection[int], least: float
) -> BlamedLine | None:
    """Return the function of a phase that some ranks are in most often of those that no other rank runs.

    Args:
        least: share of the phase that it must have.
    """
    seen = tuple(_seen_on(lines, ranks))
    functions, total, in_steps = _by_function(seen, part)
    if total < MIN_SHARE_SAMPLES or total / in_steps > phase_share + MAX_EXCESS:
        return None

    whole = max(total, phase_share * in_steps)
    often = [(place, samples / whole) for place, samples in functions.most_common() if samples >= least * whole]
    found = (_blamed(seen, part, place, share, total) for place, share in often)
    return next((each for each in found if is_of_ranks_alone(lines, part, each, ranks)), None)


def _is_alone(mine: int, of_others: int, scale: float) -> bool:
    """Return whether ranks have far more samples than others; `scale`: their samples in steps, in those of others."""
    return mine >= OWN_LINE_RATIO * (of_others * scale + 1)


def leading_lines(lines: Sequence[SampledLine], part: str, phase_share: float) -> tuple[BlamedLine, ...]:
    """Return the two functions that most of a phase is spent in together; empty if the samples show no two."""
    functions, total, in_steps = _by_function(lines, part)
    if total < MIN_SHARE_SAMPLES or total / in_steps > phase_share + MAX_EXCESS:
        return ()

    first, whole = functions.most_common(2), max(total, phase_share * in_steps)
    if len(first) < 2 or least_share(sum(samples for _, samples in first), whole) < NAMED_SHARE:
        return ()

    return tuple(_blamed(lines, part, place, samples / whole, total) for place, samples in first)


def _blamed(lines: Sequence[SampledLine], part: str, place: _Place, share: float, total: int) -> BlamedLine:
    own = _by_line(lines, part, place)
    line = max(own, key=lambda number: own[number])
    return BlamedLine(place[0], line, place[1], share, total, lines=_within_loop(lines, place, own, line))


def main_line_share(lines: Sequence[SampledLine], part: str, line: BlamedLine) -> float:
    """Return the share of its main line in the samples of a function of the user, in a part of the step."""
    seen = _seen_in(lines, part, line)
    return sum(each.samples for each in seen if each.line == line.line) / max(sum(each.samples for each in seen), 1)


def calls_code(lines: Sequence[SampledLine], part: str, line: BlamedLine, code: LibraryCode) -> bool:
    """Return whether a function of the user calls code of libraries for so much of its samples in some time."""
    return called_share(lines, part, line, code) >= code.least


def called_share(lines: Sequence[SampledLine], part: str, line: BlamedLine, code: LibraryCode) -> float:
    """Return the share of the samples of a function of the user, in some time, that are in code of libraries."""
    return library_share(_seen_in(lines, part, line), code.names, fewest=0) or 0.0


def calls_model(lines: Sequence[SampledLine], part: str, line: BlamedLine) -> bool:
    """Return whether a function of the user mostly calls a library that may run the model, as torch or a trainer."""
    return main_library(lines, part, line) is not None and not calls_code(lines, part, line, WITHOUT_MODELS)


def runs_forward(lines: Sequence[SampledLine], part: str, line: BlamedLine) -> bool:
    """Return whether code of a part of the step calls a model: the line, or its function if that does not train."""
    trains = any(_seen_in(lines, each, line) for each in ("backward", "optimizer"))
    here, calls = (
        sum(each.samples for each in _seen_in(lines, of, line) if not trains or each.line == line.line)
        for of in (part, "forward")
    )
    return calls >= _CALLS_MODEL * (calls + here)


def is_of_model(lines: Sequence[SampledLine], line: BlamedLine) -> bool:
    """Return whether a function is another method of a class whose `forward` is run, as the divergence of a layer."""
    forward = f"{line.function.rpartition('.')[0]}.forward"
    return any((each.part, each.file, each.function) == ("forward", line.file, forward) for each in lines)


def computes_loss(lines: Sequence[SampledLine], part: str, line: BlamedLine) -> bool:
    """Return whether a function of the user, apart from the training loop, calls torch's functions for a loss."""
    seen = _seen_in(lines, part, line)
    losses = sum(each.samples for each in seen if is_loss(each))
    return not is_of_loop(lines, line) and losses >= _SEEN_SHARE * max(sum(each.samples for each in seen), 1)


def is_of_loop(lines: Sequence[SampledLine], line: BlamedLine) -> bool:
    """Return whether backward runs in a function of the user too, as in a training loop or the call of a trainer."""
    return any(each.part == "backward" and line.is_function_of(each) for each in lines)


def main_library(lines: Sequence[SampledLine], part: str, line: BlamedLine) -> str | None:
    """Return the library function that a function of the user calls for half of its time; None if there is none."""
    calls: Counter[str | None] = Counter()
    for each in _seen_in(lines, part, line):
        calls[each.library] += each.samples

    called, samples = calls.most_common(1)[0] if calls else (None, 0)
    return called.rpartition(" ")[2] if called and samples >= NAMED_SHARE * calls.total() else None


def awaits_others(lines: Sequence[SampledLine], part: str, line: BlamedLine) -> bool:
    """Return whether a function mostly waits for another thread or process, as for those of a pool."""
    return main_library(lines, part, line) in WAITS_FOR_OTHERS


def is_waiting(
    lines: Sequence[SampledLine], part: str, line: BlamedLine, wait_share: float = 0.0, asleep: float = 1.0
) -> bool:
    """Return whether a function waits in a phase (for a sleep, a disk, a server, a thread), and does not compute.

    Args:
        wait_share: share of the time that training threads waited for a core, which is no such waiting.
        asleep: share of the time of steps in which a training thread neither ran nor waited for a core.
    """
    # Of a phase that is over in a millisecond, samples watch only the calls that lost their core.
    in_steps = sum(each.samples for each in lines if each.part not in OUTSIDE_STEPS)
    share = sum(each.samples for each in _seen_in(lines, part, line)) / max(in_steps, 1)
    if asleep < _ASLEEP * share:
        return False

    busy = busy_share([each for each in lines if line.is_function_of(each)], part)
    # Beside other programs one line waits for a core more than the mean: only one that hardly runs at all sleeps,
    # or is seen in a function that does nothing else.
    only_waits = awaits_others(lines, part, line)
    least = _WAITS * (1.0 - wait_share) if only_waits or wait_share < _CONTENDED else _HARDLY_RUNS
    return only_waits if busy is None else busy < least  # waits of some milliseconds are sampled, but not watched


def outside_line(lines: Sequence[SampledLine], part: str) -> BlamedLine | None:
    """Return the function that half of the time outside steps is spent in; None if the samples do not show one."""
    functions, total, _ = _by_function(lines, part)
    place, samples = functions.most_common(1)[0] if functions else (None, 0)
    if place is None or total < MIN_SAMPLES or not _is_named(functions, place, total):
        return None

    line = _by_line(lines, part, place).most_common(1)[0][0]
    return BlamedLine(place[0], line, place[1], samples / total, total)


def importing_line(lines: Sequence[SampledLine], part: str, ranks: Collection[int]) -> BlamedLine | None:
    """Return the function in which modules were imported inside steps most often; None if the samples show none.

    Its share is that of all samples in steps.
    """
    seen = [each for each in _seen_on(lines, ranks) if each.part not in OUTSIDE_STEPS]
    imports: Counter[tuple[str, int, str]] = Counter()
    for each in seen:
        if each.part == part and is_import(each) and each.file and each.line and each.function:
            imports[each.file, each.line, each.function] += each.samples

    ((file, line, function), samples), *_ = imports.most_common(1) or [(("", 0, ""), 0)]
    total = sum(each.samples for each in seen)
    return BlamedLine(file, line, function, samples / total, samples) if samples >= MIN_SAMPLES else None


def of_longest_startup(lines: Sequence[SampledLine]) -> tuple[SampledLine, ...]:
    """Return the samples of the start-up of the ranks that work longest before their first step.

    The others wait for them in a collective, or in their first step: what these do meanwhile delays nothing.
    """
    startup = [each for each in lines if each.part == LINE_PHASES[LINE_STARTUP]]
    own: Counter[int] = Counter()
    for each in startup:
        own[each.rank] += 0 if COLLECTIVES.names.search(each.library or "") else each.samples

    most = max(own.values(), default=0)
    return tuple(each for each in startup if own[each.rank] >= _AS_LONG * most)


def threads_line(lines: Sequence[SampledLine]) -> BlamedLine | None:
    """Return the function that other threads of the process spend half of their time in; None if there is none."""
    return outside_line(lines, LINE_PHASES[LINE_THREADS])


def workers_line(
    lines: Sequence[SampledLine],
    ranks: Collection[int] = (),
    others: Collection[int] = (),
    *,
    waits_are_rare: bool = False,
) -> BlamedLine | None:
    """Return the function in which loader workers spend half of the time that they make batches; None if none is shown.

    Of late ranks it may be a smaller part, which the workers of other ranks do not do.

    Nor is there one if they are idle for most of the time: what they do makes nobody wait.

    Args:
        lines: those in which workers were seen.
        ranks: the ranks whose workers are looked at; empty for all.
        others: ranks to compare with: a function that their workers run, too, makes no rank slow.
        waits_are_rare: whether training waits in few steps, between which workers may be idle.
    """
    part, mine = LINE_PHASES[LINE_WORKERS], tuple(_seen_on(lines, ranks))
    busy = [each for each in mine if not each.is_idle]
    found = outside_line(busy, part)
    if not (waits_are_rare or workers_at_work(mine).is_most):
        return None

    if others and (found is None or not _is_alone_in(found, tuple(_seen_on(lines, others)))):
        found = _line_of_workers_alone(busy, part, tuple(_seen_on(lines, others)))

    return None if found is None else replace(found, of_workers=True)


def _line_of_workers_alone(busy: Sequence[SampledLine], part: str, usual: Sequence[SampledLine]) -> BlamedLine | None:
    """Return a function that takes much of the workers' time, and hardly any of that of other ranks' workers."""
    functions, total, _ = _by_function(busy, part)
    if total < MIN_SHARE_SAMPLES:
        return None

    often = [place for place, samples in functions.most_common() if samples >= NAMED_OF_EXCESS * total]
    found = (_blamed(busy, part, place, functions[place] / total, total) for place in often)
    return next((each for each in found if _is_alone_in(each, usual)), None)


def _is_alone_in(found: BlamedLine, usual: Sequence[SampledLine]) -> bool:
    """Return whether workers of other ranks clearly run a function less; quick ones are in hardly any sample."""
    part = LINE_PHASES[LINE_WORKERS]
    _, total, _ = _by_function([each for each in usual if not each.is_idle], part)
    in_it = sum(each.samples for each in _seen_in(usual, part, found))
    if total < MIN_SAMPLES:
        return not in_it

    return found.share - in_it / total >= NAMED_OF_EXCESS


def line_beside_imports(lines: Sequence[SampledLine], part: str) -> BlamedLine | None:
    """Return `outside_line` of the time in which no modules are imported."""
    return outside_line([each for each in lines if not is_import(each)], part)


def own_line(
    lines: Sequence[SampledLine], part: str, phase_share: float, ranks: Collection[int] = ()
) -> BlamedLine | None:
    """Return `blamed_line` of the same arguments, where it is more than the call of a trainer."""
    return unless_trainer(lines, blamed_line(lines, part, phase_share, ranks))


def unless_trainer(lines: Sequence[SampledLine], line: BlamedLine | None) -> BlamedLine | None:
    """Return a line; None for the call of a trainer, whose own code takes the time."""
    return None if line is None or calls_trainer(lines, line) else line


def line_without_hidden(line: BlamedLine | None, phase_share: float, hidden_share: float) -> BlamedLine | None:
    """Return a line with its share if all that is hidden was in it; None if that is not most of the phase.

    Args:
        phase_share: share of the step that the phase has, without what is hidden.
        hidden_share: share of the step that another finding has of the phase: samples are of it, too.
    """
    if line is None or not hidden_share or phase_share <= 0:
        return line

    share = (line.share * (phase_share + hidden_share) - hidden_share) / phase_share
    return replace(line, share=share) if share >= NAMED_SHARE else None


def calls_trainer(lines: Sequence[SampledLine], line: BlamedLine) -> bool:
    """Return whether a line only calls a library's trainer (`trainer.train()`, `model.learn()`): it is no loop.

    Then backward passes and optimizer run in the very same line, in a library. The forward passes stand for an
    optimizer that the hooks do not know, or that was seen too seldom; so do all other phases of steps in that line,
    where the script's own code is called for forward, as Lightning's `training_step`.
    """
    seen = [each for each in lines if line.is_line_of(each)]
    itself = sum(each.samples for each in seen if each.library is None)
    if itself > _OWN_SHARE * sum(each.samples for each in seen):
        return False

    if not _has_most(lines, "backward", line) or not _has_most(lines, "optimizer", line, fewest=0):
        return False

    if _has_most(lines, "optimizer", line) or _has_most(lines, "forward", line):
        return True

    others = sum(each.samples for each in seen if each.part in _OTHER_PHASES)
    return others >= _FEW_SAMPLES and _has_most(lines, "optimizer", line, fewest=1)


def _has_most(lines: Sequence[SampledLine], phase: str, line: BlamedLine, fewest: int = _FEW_SAMPLES) -> bool:
    seen = [each for each in lines if each.part == phase]
    same = sum(each.samples for each in seen if line.is_line_of(each))
    total = sum(each.samples for each in seen)
    return total >= fewest and same >= NAMED_SHARE * total


def _is_named(functions: Counter[_Place], place: _Place, whole: float, excess: float | None = None) -> bool:
    """Return whether a function has half of a phase, certainly; of late ranks, a part of it that others lack.

    Args:
        functions: samples of the phase by place.
        whole: samples that the phase should have.
        excess: samples beyond those of the other ranks.
    """
    samples = min(functions[place], whole)
    is_certain = least_share(samples, whole) >= NAMED_SHARE
    if excess is not None:
        return excess >= NAMED_OF_EXCESS * whole and (is_certain or whole >= MIN_SHARE_SAMPLES)

    second = max((count for other, count in functions.items() if other != place), default=0)
    leads = whole >= MIN_SHARE_SAMPLES and samples >= max(NAMED_SHARE * whole, LEADING_RATIO * second)
    return is_certain or leads


def _by_line(lines: Iterable[SampledLine], part: str, place: _Place) -> Counter[int]:
    counts: Counter[int] = Counter()
    for each in of_part(lines, part):
        if _place_of(each) == place and each.line is not None:
            counts[each.line] += each.samples

    return counts


def _within_loop(lines: Iterable[SampledLine], place: _Place, own: Counter[int], line: int) -> tuple[int, int] | None:
    """Return the shortest range of lines around the main one with most of a function's samples in a part of the step.

    None where the main line has them, or the function is of that part alone: what it does belongs together, while a
    training loop has code of all parts.

    Args:
        own: samples of the part by line of the function.
        line: the main line.
    """
    least = MAIN_LINE_SHARE * own.total()
    if own[line] >= least:
        return None

    if len({each.part for each in lines if each.part not in OUTSIDE_STEPS and _place_of(each) == place}) < 2:
        return None

    found: list[tuple[int, int]] = []
    seen = sorted(own)
    for at, first in enumerate(seen):
        sums = itertools.accumulate(own[each] for each in seen[at:])
        last = next((last for last, inside in zip(seen[at:], sums, strict=True) if last >= line and inside >= least), 0)
        if first <= line <= last:
            found.append((first, last))

    return min(found, key=lambda each: each[1] - each[0])


def _by_function(lines: Iterable[SampledLine], part: str) -> tuple[Counter[_Place], int, int]:
    """Return (samples of a phase by place, samples of the phase, samples in steps)."""
    functions: Counter[_Place] = Counter()
    total = in_steps = 0
    for each in lines:
        if is_passing(each):
            continue

        in_steps += each.samples if each.part not in OUTSIDE_STEPS else 0
        if each.part == part:
            total += each.samples
            place = None if receives(each) else _place_of(each)
            if place is not None:
                functions[place] += each.samples

    return functions, total, in_steps


def _by_place(
    lines: Sequence[SampledLine], part: str, ranks: Collection[int]
) -> tuple[Counter[tuple[str, int | None]], int]:
    """Return (samples of a phase by file and line, samples in steps)."""
    places: Counter[tuple[str, int | None]] = Counter()
    for each in _seen_on(of_part(lines, part), ranks):
        if each.file is not None and not receives(each):
            places[each.file, each.line] += each.samples

    return places, _by_function(_seen_on(lines, ranks), part)[2]


def _seen_in(lines: Sequence[SampledLine], part: str, line: BlamedLine) -> list[SampledLine]:
    return [each for each in of_part(lines, part) if _place_of(each) == _place_of(line)]


def _place_of(each: SampledLine | BlamedLine) -> _Place | None:
    if each.file is None or each.function is None:
        return None

    return each.file, each.function, each.line if each.function == _MODULE else None


def _seen_on(lines: Sequence[SampledLine], ranks: Collection[int]) -> Iterator[SampledLine]:
    return (each for each in lines if not ranks or each.rank in ranks)
