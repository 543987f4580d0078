"""Functions that torch.compile compiles again and again, as their inputs differ each time."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from traceml.database.schema import Compiled, Pause
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.pauses import Rows, are_first_versions
from traceml.diagnosis.findings import Explanation, Finding
from traceml.diagnosis.kinds import WARNING_SHARE, Kind, least_cost_ns
from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.diagnosis.steps.own_work import OwnWork
from traceml.diagnosis.steps.speedup import saved_ns, speedup_of_share
from traceml.diagnosis.steps.step_split import Floats
from traceml.formatting import duration_text, gain_text, percent_text, place_words, plural

__all__ = ["compiled_in", "recompiles"]

MIN_NUMBER = 3
"""A function is compiled twice in healthy runs: for the last batch, which is smaller, and without gradients."""
_TAKEN_FROM = ("forward", "backward", "other")
_SHAPE = re.compile(
    r"(?:size|stride) mismatch at index (\d+)|\.(?:size|shape|stride)\b(?:\(\))?(?:\[(\d+)\]|\((\d+)\))?"
)
_GRADIENTS = "grad_mode"
_OWN = "/torch/_dynamo/"  # a frame that torch puts around a module of its own
_REPORTED_SHARE, _REPORTED_GAIN = 0.01, 1.05
_MAX_SHARE = 0.99
_MOSTLY = 0.5
"""A step of which compiling takes this share is long for what else a first call does, too."""
_GIVEN_UP = " The recompile limit was reached: inputs that fit no compiled version run in eager mode."


def recompiles(window: AlignedSteps, work: OwnWork, facts: JobFacts) -> tuple[list[Finding], dict[str, Floats]]:
    """Return the finding about recompiled functions, and the parts of the step without these compilations.

    It is about the compilations of a run after the first step of each function, of the rank that spent most on them.
    """
    taken = facts.pauses.per_step(work.ranks, window.steps, Pause.COMPILATION)
    # A compilation explains a long step, even if it is too short for a finding.
    without = _without(work, sum(taken.values(), np.zeros_like(work.own))) if taken else {}
    rank, rows = facts.pauses.longest(work.ranks, Pause.COMPILATION, _often)
    if not len(rows):
        return [], without

    if facts.time is None:
        share = _window_share(window, work, facts)
    else:
        share = min(_seconds(rows) / facts.time.wall_s, _MAX_SHARE) if facts.time.wall_s > 0 else 0.0

    is_told = share >= WARNING_SHARE or (rows["detail"] == Compiled.LIMIT).any()
    return [_finding(work, facts, rank, rows, share)] if is_told else [], without


def _window_share(window: AlignedSteps, work: OwnWork, facts: JobFacts) -> float:
    """Return the share of step time; 0 if it is too small to report."""
    taken = facts.pauses.per_step(work.ranks, window.steps, Pause.COMPILATION, _are_recompilations)
    saved = saved_ns(work, _without(work, sum(taken.values(), np.zeros_like(work.own))))
    return saved / work.step_ns if saved >= least_cost_ns(work.step_ns) else 0.0


def _are_recompilations(rows: Rows) -> NDArray[np.bool_]:
    return np.asarray(~are_first_versions(rows) | (rows["detail"] == Compiled.LIMIT))


def _seconds(rows: Rows) -> float:
    return float(rows["ns"].sum()) / 1e9


def _often(rows: Rows) -> Rows:
    """Return the rows of functions that were recompiled often, without the first of each."""
    rows = rows[_are_recompilations(rows)]
    again = rows[rows["detail"] == Compiled.AGAIN]["line_id"]
    functions, counts = np.unique(again, return_counts=True)
    limited = rows[rows["detail"] == Compiled.LIMIT]["line_id"]
    return rows[np.isin(rows["line_id"], np.concatenate([functions[counts >= MIN_NUMBER], limited]))]


def _without(work: OwnWork, ns: Floats) -> dict[str, Floats]:
    """Return the parts without compiling, which a call of the model does first, then its backward pass."""
    without: dict[str, Floats] = {}
    mostly = (ns >= _MOSTLY * np.maximum(work.step, 1)).any(axis=0)
    for part in _TAKEN_FROM:
        if part in work.parts:
            values = work.parts[part]
            without[part] = np.maximum(values - ns, 0)
            ns = ns - (values - without[part])
            usual = np.median(values, axis=1, keepdims=True)
            without[part][:, mostly] = np.minimum(without[part][:, mostly], usual)

    return without


def compiled_in(steps: NDArray[np.int64], total_ns: float, work: OwnWork, facts: JobFacts) -> Explanation | None:
    """Explain long steps by what torch.compile compiled in them; None if that took less than half of their time."""
    rank, rows = facts.pauses.longest(work.ranks, Pause.COMPILATION, lambda rows: rows[np.isin(rows["step"], steps)])
    seconds = _seconds(rows)
    if not len(rows) or seconds * 1e9 < _MOSTLY * total_ns:
        return None

    place = facts.pauses.place(rank, rows)
    guard = facts.pauses.most_frequent(rank, rows, "text_id")
    why = f" ({guard})" if guard else ""
    where = f": there torch.compile compiled {_place_of(place) or 'the model'}, for {duration_text(seconds)}{why}"
    once = "Each version is compiled once, so in a longer run its share is smaller."
    action = f"{_advice(guard)}. {once}" if guard else once
    return Explanation(where, action, {"compile_s": seconds})


def _place_of(place: tuple[str | None, int | None, str | None]) -> str:
    return "" if _OWN in (place[0] or "") else place_words(*place)


def _finding(work: OwnWork, facts: JobFacts, rank: int, rows: Rows, share: float) -> Finding:
    again = rows[rows["detail"] == Compiled.AGAIN]
    told = again if len(again) else rows  # where torch allows a single version, none is compiled again
    guards, functions = told[told["text_id"] >= 0], len(np.unique(rows["line_id"]))
    guard = facts.pauses.text(rank, int(guards["text_id"][-1])) if len(guards) else ""  # the newest that was not met
    file, line, function = called = facts.pauses.place(rank, told)
    gave_up = bool((rows["detail"] == Compiled.LIMIT).any())  # calls run uncompiled from then on
    gain, seconds = speedup_of_share(share), _seconds(rows)
    place = _place_of(called)
    what = (place or "the model") + (f" and {plural(functions - 1, 'other function')}" if functions > 1 else "")
    did = f"recompiled {what} {plural(len(again), 'time')}" if len(again) else f"compiled {what} once"
    why = f"; the last reason: {guard}" if guard else ""
    took = f", in {duration_text(seconds)} ({percent_text(share)} of the time)" if share >= _REPORTED_SHARE else ""
    return Finding.of(
        Kind.RECOMPILES,
        summary=f"torch.compile {did}{took}{why}.{_GIVEN_UP if gave_up else ''}",
        next=_advice(guard) + (f": {gain_text(gain)}." if gain >= _REPORTED_GAIN else "."),
        evidence={
            "recompiles": len(again),
            "compile_s": seconds,
            "guard": guard,
            "limit_reached": gave_up,
            "steps": work.own.shape[1],
            **({"file": file, "line": line, "function": function} if place else {}),
        },
        cost_share=share,
        speedup_if_fixed=gain,
    )


def _advice(guard: str) -> str:
    if shape := _SHAPE.search(guard):
        dimension = next(filter(None, shape.groups()), "dim")
        return (
            "Compile for any size (torch.compile(model, dynamic=True), or torch._dynamo.mark_dynamic(x, "
            f"{dimension}) for one dimension), or pad batches to a few sizes"
        )

    if _GRADIENTS in guard:
        return "Compile one model for training and another for evaluation, or evaluate with model._orig_mod"

    return (
        "Pass what changes as a tensor, or keep it out of the compiled function: other values are compiled into its "
        "code (TORCH_LOGS=recompiles lists them)"
    )
