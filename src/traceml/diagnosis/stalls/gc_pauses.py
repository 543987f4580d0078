"""Garbage collections that stop the training: those that its code calls for, and the interpreter's own."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from traceml.database.schema import Pause, Phase
from traceml.diagnosis.facts.blamed_lines import BlamedLine, importing_line, own_line
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.pauses import Rows
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind, least_cost_ns
from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.diagnosis.steps.own_work import OwnWork, have_half
from traceml.diagnosis.steps.speedup import replayed, saved_ns, speedup
from traceml.diagnosis.steps.step_split import Floats
from traceml.formatting import (
    gain_text,
    library_text,
    ns_text,
    ordinal_text,
    parsed_place,
    percent_text,
    place_words,
    ranks_text,
)

__all__ = ["gc_pauses"]

LEFT_SHARE = 0.01
"""Collections as seldom as advised take this share of the step at most."""
MIN_NUMBER = 3
"""Fewer collections in a window are chance, not a habit of the run."""
MAX_IN_STEP = 0.5
"""If one step has more of their time than this, and modules are imported in steps, they are part of that pause."""
_COLLECTIVE = Phase.COMM.label
_ROUND = (1, 2, 5, 10)
_MIN_EVERY = 10
_MAX_EVERY = 1000
_OLDEST = 2
_MOST = 0.7  # of the time of collections is in one part of the step, if a line is named
_FEWER_OBJECTS = " Or make fewer objects in {}: their number starts the collections."


class _Collections(msgspec.Struct, frozen=True):
    """Collections of one origin in a window."""

    called: bool  # whether the script's code called for them
    without: dict[str, Floats]  # part of the step -> its work without them, rank x step
    ranks: tuple[int, ...]  # ranks that have them; empty for all
    rows: Rows
    saved_ns: float  # time by which the mean step would be shorter
    collective_ns: float  # the part of it in collectives
    of_imports: bool  # whether most of their time is in one step, as modules are imported there
    place: tuple[str | None, int | None, str | None]  # the line that called for most of them
    library: str  # the line of a library that did, `FILE:LINE FUNCTION`; empty if the user's code did

    @property
    def full_ns(self) -> float:
        """Mean time of a collection of everything; of any where there was none."""
        single = self.rows[self.rows["count"] == 1]
        full = single[single["detail"] == _OLDEST]
        chosen = full if len(full) else single
        return float(chosen["ns"].mean()) if len(chosen) else 0.0

    @property
    def number(self) -> int:
        """Number of collections."""
        return int(self.rows["count"].sum())

    def is_significant(self, work: OwnWork) -> bool:
        """Return whether there are several that cost enough, and not mostly those of a step that imports modules."""
        is_habit = self.number >= MIN_NUMBER and not self.of_imports
        return is_habit and self.saved_ns >= least_cost_ns(work.step_ns)


def gc_pauses(window: AlignedSteps, work: OwnWork, facts: JobFacts) -> tuple[list[Finding], dict[str, Floats]]:
    """Return the findings about garbage collections, and the parts of the step without them."""
    found: list[Finding] = []
    without: dict[str, Floats] = {}
    for called in (True, False):
        changed = replayed(work, without)
        cost = _collections(window, changed, facts, called=called)
        if cost is not None and cost.is_significant(work):
            line = None if called else _allocating_line(work, changed, cost, facts)
            found.append(_finding(work, cost, line))
            without |= cost.without

    return found, without


def _collections(window: AlignedSteps, work: OwnWork, facts: JobFacts, *, called: bool) -> _Collections | None:
    taken = facts.pauses.per_step(
        work.ranks, window.steps, Pause.COLLECTION, lambda rows: rows["called"] == int(called)
    )
    if not taken:
        return None

    without: dict[str, Floats] = {}
    for phase, ns in taken.items():
        if phase == _COLLECTIVE and phase not in work.parts:
            continue

        part = phase if phase in work.parts else "other"  # a user's phase has a name of its own
        if part in work.parts:
            left = without.get(part, work.parts[part])
            without[part] = np.maximum(left - _lost_time(left, ns, device=work.device), 0)

    by_step = sum(taken.values(), np.zeros_like(work.own))
    totals = by_step.sum(axis=1)
    ranks = work.named(have_half(totals))
    by_rank = _rows_in(window, facts, work, called=called)
    rows = np.concatenate(list(by_rank.values()))
    lead = int(work.ranks[int(totals.argmax())])
    single = by_rank[lead][by_rank[lead]["count"] == 1]  # ids of places are those of their rank
    place = facts.pauses.place(lead, single)
    library = facts.pauses.most_frequent(lead, single, "text_id")
    most = float(by_step[int(totals.argmax())].max() / max(float(totals.max()), 1.0))
    of_imports = most > MAX_IN_STEP and any(importing_line(facts.lines, part, ranks) for part in work.parts)
    # Within collectives, as where objects are unpickled, all wait.
    in_collectives = None if _COLLECTIVE in work.parts else taken.get(_COLLECTIVE)
    collective_ns = 0.0 if in_collectives is None else float(np.minimum(in_collectives.max(axis=0), work.step).mean())
    saved = saved_ns(work, without) + collective_ns
    return _Collections(called, without, ranks, rows, saved, collective_ns, of_imports, place, library)


def _allocating_line(work: OwnWork, without_called: OwnWork, cost: _Collections, facts: JobFacts) -> BlamedLine | None:
    """Return the line in which most of the interpreter's collections run: they are started by what allocates there.

    It is the line with most of a part of the step, if it has so much of it that it must have half of the collections.

    Args:
        without_called: the work without the collections that the script calls for, which samples are of, too.
    """
    taken = {part: float((without_called.parts[part] - left).mean()) for part, left in cost.without.items()}
    part = max(taken, key=lambda name: taken[name], default=None)
    if part is None:
        return None

    part_ns = float(work.parts[part].mean())
    line = own_line(facts.lines, part, part_ns / work.step_ns, cost.ranks)
    if line is None or taken[part] < _MOST * (sum(taken.values()) + cost.collective_ns):
        return None

    return line if line.share >= 1 - taken[part] / part_ns / 2 else None


def _lost_time(values: Floats, ns: Floats, *, device: bool) -> Floats:
    """Return the time that a part loses by pauses; on a device only its excess over steps without a pause."""
    if not device:
        return np.minimum(ns, values)

    free = ~(ns > 0).any(axis=0)
    usual = np.median(values[:, free], axis=1, keepdims=True) if free.mean() >= 0.5 else np.zeros((len(values), 1))
    return np.clip(values - usual, 0, ns).astype(np.float32)


def _rows_in(window: AlignedSteps, facts: JobFacts, work: OwnWork, *, called: bool) -> dict[int, Rows]:
    found = {}
    for rank in sorted(facts.pauses.ranks(Pause.COLLECTION).intersection(work.ranks.tolist())):
        rows = facts.pauses.rows(rank, Pause.COLLECTION)
        inside = (rows["step"] >= window.steps[0]) & (rows["step"] <= window.steps[-1])
        found[rank] = rows[inside & (rows["called"] == int(called))]

    return found


def _every(full_ns: float, step_ns: float) -> int:
    """Return after how many steps a full collection takes a hundredth of the time: 10, 20, 50, 100, ..."""
    wanted = max(full_ns / max(LEFT_SHARE * step_ns, 1.0), _MIN_EVERY)
    power: int = 10 ** int(np.log10(wanted))
    return next(digit * power for digit in _ROUND if digit * power >= wanted)


def _finding(work: OwnWork, cost: _Collections, allocates: BlamedLine | None) -> Finding:
    step_ns, share = work.step_ns, cost.saved_ns / work.step_ns
    every = _every(cost.full_ns, step_ns - cost.saved_ns)
    # What is left of them if they come as seldom as advised.
    kept_ns = min(cost.full_ns / every, cost.saved_ns)
    gain = speedup(work.step_ns, cost.saved_ns - kept_ns)
    file, line, function = cost.place
    place = place_words(*cost.place) if cost.called else ""
    return Finding.of(
        Kind.GC_PAUSES,
        ranks=cost.ranks,
        summary=(
            f"{_subject(cost, place)} {ns_text(cost.saved_ns)} of each {ns_text(step_ns)} step "
            f"({percent_text(share)}): {_times(work, cost)}"
            f"{f', most of them in {allocates.place}' if allocates else ''}."
        ),
        next=_advice(cost, every, gain) + (_FEWER_OBJECTS.format(allocates.place) if allocates else ""),
        evidence={
            "pause_ms": cost.full_ns / 1e6,
            "collections": cost.number,
            "steps": work.own.shape[1],
            "step_ms": step_ns / 1e6,
            "called": cost.called,
            "every_advised": every,
            **({"file": file, "line": line, "function": function, "line_share": share} if place else {}),
            **({"file": allocates.file, "line": allocates.line, "function": allocates.function} if allocates else {}),
            **({"library": cost.library} if cost.library else {}),
        },
        cost_share=share,
        speedup_if_fixed=gain,
    )


def _subject(cost: _Collections, place: str) -> str:
    where = f" on {ranks_text(cost.ranks)}" if cost.ranks else ""
    file, line, function = parsed_place(cost.library)
    if file and (inside := place_words(file, line, function)):
        through = f", through {place}," if place and place != inside else ""
        return f"The gc.collect() of {_library_name(file)} at {inside}{through}{where} takes"

    if cost.called:
        return f"The script's gc.collect(){f' at {place}' if place else ''}{where} takes"

    return f"The interpreter's garbage collector{where} takes"


def _times(work: OwnWork, cost: _Collections) -> str:
    long = f", a full one {ns_text(cost.full_ns)}" if (cost.rows["detail"] == _OLDEST).any() else ""
    known = np.isin(work.ranks, cost.ranks).sum() or len(work.ranks)  # not those that others represent
    apart = work.own.shape[1] * float(known) / max(cost.number, 1)
    if apart >= 1.5:
        return f"one in {apart:.0f} steps{long}"

    often = "one" if apart > 0.67 else f"{1 / apart:.0f}"
    return f"{often} in each step{long}"


def _library_name(file: str) -> str:
    inside = library_text(file)
    return (Path(file).name if inside == file else inside).partition("/")[0].removesuffix(".py")


def _advice(cost: _Collections, every: int, gain: float) -> str:
    seldom = "" if every > _MAX_EVERY else f"every {ordinal_text(every)} step"
    if not (cost.called or cost.library):
        return (
            f"Before the loop call gc.collect(), gc.freeze() and gc.disable(), and then gc.collect() "
            f"{seldom or 'between epochs'}: {gain_text(gain)}."
        )

    how = f"Take the call out of the loop{f', or call it {seldom}' if seldom else ''}"
    if cost.library:
        how = f"Look for an option of {_library_name(parsed_place(cost.library)[0] or '')} that leaves it out"

    return (
        f"Tensors are freed without it. {how}: {gain_text(gain)}. gc.freeze() before the loop makes each collection "
        "shorter."
    )
