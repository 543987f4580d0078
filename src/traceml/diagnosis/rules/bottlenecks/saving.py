"""Saving of checkpoints that all ranks spend time on, or wait for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from traceml.diagnosis import advice
from traceml.diagnosis.facts.blamed_lines import BlamedLine
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.pauses import Saves
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import FLOOR_NS, Kind
from traceml.diagnosis.rules.bottlenecks.phase_cost import PhaseCost
from traceml.diagnosis.steps.own_work import OwnWork
from traceml.diagnosis.steps.speedup import saved_ns, speedup
from traceml.diagnosis.steps.step_split import Floats
from traceml.formatting import bytes_text, ns_text, percent_text, place_words, ranks_text

__all__ = ["checkpoints"]

TURNS_FACTOR = 1.5
"""Ranks save one after the other if a step becomes longer by this many times what one of them takes."""
SAVING_SHARE = 1 / 3
"""A rank saves if it takes this share of the time of the one that saves longest."""


def checkpoints(work: OwnWork, facts: JobFacts, step_ns: float) -> list[Finding]:
    """Find saving that all ranks spend time on, or wait for."""
    values = work.parts.get("checkpoint")
    if values is None:
        return []

    # In the window's last step scripts save and end.
    longest = values[:, :-1].max(axis=0, initial=0)
    saves = longest > FLOOR_NS
    kept = np.concatenate([np.zeros_like(values[:, :-1]), values[:, -1:]], axis=1)
    sums = values[:, :-1].sum(axis=1)
    ranks, removed = work.named(sums >= SAVING_SHARE * sums.max()), values - kept
    turns_ns = _saving_in_turns_ns(work, saves, longest)
    saved = saved_ns(work, {"checkpoint": kept}) if turns_ns is None else turns_ns.sum() / len(work.step)
    cost = PhaseCost(work, "checkpoint", step_ns, ranks, removed, float(saved))
    if saves.sum() < 2 or not cost.exceeds():
        return []

    count, each_ns = int(saves.sum()), float((longest[saves] if turns_ns is None else turns_ns).mean())
    known, half = facts.pauses.saves(work.ranks), speedup(step_ns, cost.saved_ns / 2)
    where = f" on {ranks_text(ranks)}" if ranks else ""
    where += "" if turns_ns is None else ", one rank after the other"
    line = cost.line(facts)
    if line is not None and known is not None and (known.file, known.function) == (line.file, line.function):
        line = None  # it only calls the save

    # Screens show the time of a save in the last step, too.
    at_end = ", not counting the one in the last step" if values[:, -1].max(initial=0) > FLOOR_NS else ""
    summary = (
        f"Saving takes {percent_text(cost.saved_ns / step_ns)} of step time: {count} of {len(saves)} steps save{where}"
        f", for {ns_text(each_ns)} each{_of_save(known, line)}{at_end}; without it steps would be "
        f"{cost.faster}."
    )
    evidence = {"saves": count, "save_ms": each_ns / 1e6, **(known.evidence() if known is not None else {})}
    todo = advice.for_saving(half, line, asynchronous=known is not None and known.asynchronous is True)
    todo += "" if turns_ns is None else " Or save on all ranks at the same time: now each one waits for the others."
    return [cost.finding(Kind.CHECKPOINT_STALLS, summary, todo, evidence, half)]


def _saving_in_turns_ns(work: OwnWork, saves: NDArray[np.bool_], longest: Floats) -> Floats | None:
    """Return how much longer the steps are in which ranks save one after the other, and wait; None if they do not.

    Args:
        saves: which steps save, without the last one.
        longest: how long the rank does that saves longest.
    """
    if not work.grouped or len(work.ranks) < 2 or not saves.any() or saves.all():
        return None

    # What the ranks wait for beyond their own work is what others save.
    waits = (work.step - work.longest(work.own))[:-1]
    waits_ns = np.maximum(waits[saves] - float(np.median(waits[~saves])), 0)
    whole = work.parts["checkpoint"][:, :-1][:, saves].sum(axis=0)
    in_turns = np.minimum(longest[saves] + waits_ns, whole)
    return np.asarray(in_turns) if in_turns.sum() >= TURNS_FACTOR * longest[saves].sum() else None


def _of_save(known: Saves | None, line: BlamedLine | None) -> str:
    """Return where and how fast checkpoints are written: `, in train.py:93 train (76 MiB, 184 MiB/s)`.

    Args:
        line: code of the script in which most of saving is: then files are written faster than that.
    """
    inside = "" if line is None else line.of_it
    if known is None:
        return inside

    place = place_words(known.file, known.line, known.function)
    where = f", in {place}" if place else ""
    if line is not None:
        return where + inside

    if known.size_bytes is None or known.bytes_per_s is None:
        return where

    return f"{where} ({bytes_text(int(known.size_bytes))}, {bytes_text(int(known.bytes_per_s))}/s)"
