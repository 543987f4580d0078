"""Time in the script's own phases, and in code outside of all phases."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from msgspec.structs import replace

from traceml.diagnosis import advice
from traceml.diagnosis.facts.blamed_lines import main_library
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.sampled_shares import MIN_SHARE_SAMPLES, clearing_share, loss_share, place_share
from traceml.diagnosis.findings import Finding, known_facts
from traceml.diagnosis.kinds import WARNING_SHARE, Kind
from traceml.diagnosis.rules.bottlenecks.data_bound import iterator_bound
from traceml.diagnosis.rules.bottlenecks.phase_cost import RARE_FACTOR, RARE_STEPS, PhaseCost, cost_of
from traceml.diagnosis.steps.own_work import COMPUTE, UNNAMED_CODE, OwnWork
from traceml.diagnosis.steps.speedup import speedup
from traceml.formatting import gain_text, phase_words

__all__ = ["residual"]

UNSURE_SHARE = 0.20
"""Code outside the phases is reported from this share on with too few cores, or too few samples to know where it is."""
MIN_EXCLUDED = 0.02
"""An excluded part is mentioned from this share on."""
_UPDATE = "the update"
_LITTLE_UPDATE = 0.1
"""Below this share of `other`, the functions that read gradients are not the whole update by hand."""
_MAY_UPDATE = ", which may be the update: no optimizer is called in the steps."
_LOSS_OF = ("other", "forward")
_PASSES, _GRAPH_RATIO = ("forward", "backward"), 5.0
"""Backward of the model alone takes fewer times as long as forward, also where activations are computed again."""


def residual(
    work: OwnWork,
    facts: JobFacts,
    step_ns: float,
    whole: OwnWork | None = None,
    hidden_ns: Mapping[str, float] | None = None,
) -> list[Finding]:
    """Find time in the user's own phases, or outside all phases.

    Args:
        whole: the same with long steps that another finding has; None for none.
        hidden_ns: mean time of each part that another finding has and `work` has not, as of garbage collections.
    """
    known = {*COMPUTE, "input_wait", "h2d", "comm", "checkpoint"}
    found = []
    update, facts_with_update = _own_update(work, facts)
    may_have_update = _is_unseen(work, "optimizer") and update < _LITTLE_UPDATE
    update, facts = (0.0, facts) if may_have_update else (update, facts_with_update)
    work, whole = _with_update(work, update), None if whole is None else _with_update(whole, update)
    for part in work.parts:
        if part in known:
            continue

        long_ns = 0.0 if whole is None else max(float((whole.parts[part] - work.parts[part]).mean()), 0.0)
        if part == "other" and (waiting := iterator_bound(work, facts, step_ns, long_ns)):
            found.append(waiting)
            continue

        cost = _cost_of_code(work, part, facts, step_ns, update)
        if cost is None:
            continue

        cost = replace(cost, hidden_ns=(hidden_ns or {}).get(part, 0.0))
        own_ns = float(work.parts[part].mean())
        if whole is not None and RARE_STEPS not in cost.excluded and own_ns + long_ns > RARE_FACTOR * own_ns:
            cost = replace(cost, excluded=(RARE_STEPS, *cost.excluded), with_rare=whole)

        found += _residual_finding(cost, facts, may_have_update=part == "other" and may_have_update)

    return found


def _cost_of_code(work: OwnWork, part: str, facts: JobFacts, step_ns: float, update_share: float) -> PhaseCost | None:
    """Return the cost of a part that is the script's own code; None if it is too small to be reported."""
    # A named phase explains its rare long steps; those of unnamed code are jitter.
    cost = cost_of(work, part, step_ns, rare_share=0.05 if part in UNNAMED_CODE else 0)
    if part == "other":
        cost = _without_torch(cost, work, facts)
        cost = replace(cost, excluded=(*cost.excluded, _UPDATE)) if update_share >= MIN_EXCLUDED else cost

    unsure = part in UNNAMED_CODE and facts.oversubscribed
    return cost.reported() if cost.exceeds(UNSURE_SHARE if unsure else WARNING_SHARE) else None


def _residual_finding(cost: PhaseCost, facts: JobFacts, *, may_have_update: bool) -> list[Finding]:
    """Return the finding about a cost and its place; none if it may be a wait for a core, or its place is not known."""
    line, sampled = cost.line(facts), cost.sampled_line(facts)
    library = None if sampled is None else main_library(facts.lines, cost.part, sampled)
    two = cost.leading_lines(facts) if line is None and library is None else ()
    is_known = cost.part not in UNNAMED_CODE or line or library or two
    if not is_known and (facts.is_core_wait(cost.saved_ns / cost.step_ns) or _is_unsure(cost, facts)):
        return []

    waits = line is not None and facts.waits_in(cost.part, line)
    has_forward = cost.part == "other" and _is_unseen(cost.work, "forward")
    is_update = (may_have_update and not has_forward and library is None) and line is not None and not waits
    cost = _counting_update(cost) if is_update else cost
    where = phase_words(cost.part) + (line.of_it if line else f", most of it in {library}" if library else "")
    if line and library == advice.EVENT_LOOP:
        where += ", where the event loop waits because no task can run"

    where += cost.turns_words
    line_share = 1.0 if line is None or line.is_rough else line.share
    untimed = advice.waiting_for_device(facts, is_timed=cost.work.device)
    gain = 1.0 if is_update or untimed else speedup(cost.step_ns, cost.saved_ns * line_share)
    what = "that part" if line_share < 1.0 else "it"
    makes_graph = cost.part == "other" and _makes_graph(cost.work)
    # What is waited for, as a batch that a thread makes, may take as long elsewhere. A loss has its part of backward.
    bound = "at most" if waits else "at least" if makes_graph else ""
    faster = gain_text(gain, bound)
    without = _MAY_UPDATE if is_update else f"{untimed or f'; without {what} steps would be {faster}'}."
    summary = f"{cost.of_step} is spent in {where}{without}"
    text = advice.for_residual(
        cost.part,
        line,
        facts,
        library,
        has_forward=has_forward,
        is_update=is_update,
        makes_graph=makes_graph,
        trainer=sampled if line is None and library is None else None,
        two=two,
        of="it" if cost.with_rare is None else f"it and the {RARE_STEPS}",
    )
    text += advice.IN_SAME_STEPS if cost.in_turns else advice.AS_MUCH_IN_EACH_STEP if cost.is_uneven else ""
    evidence = cost.line_evidence(line) | known_facts(in_turns=cost.in_turns or None)
    return [cost.finding(Kind.RESIDUAL_HEAVY, summary, text, evidence, gain)]


def _makes_graph(work: OwnWork) -> bool:
    """Return whether backward takes far longer than the model's forward: it follows other operations, as of a loss."""
    forward, backward = (float(work.parts[part].mean()) if part in work.parts else 0.0 for part in _PASSES)
    return not work.device and 0.0 < _GRAPH_RATIO * forward <= backward


def _is_unsure(cost: PhaseCost, facts: JobFacts) -> bool:
    """Return whether it costs little, and was seen too seldom to know where: each loop has some code of its own."""
    seen = sum(each.samples for each in facts.lines if each.part == cost.part)
    return bool(facts.lines) and seen < MIN_SHARE_SAMPLES and not cost.exceeds(UNSURE_SHARE)


def _own_update(work: OwnWork, facts: JobFacts) -> tuple[float, JobFacts]:
    """Return the share of `other` that updates weights by hand, and the facts with its lines as the optimizer's.

    It is that of the functions that read gradients, by samples; none where backward is shorter: they do more than that.
    """
    if not facts.own_updates or not _is_unseen(work, "optimizer") or "other" not in work.parts:
        return 0.0, facts

    share = place_share(facts.lines, facts.own_updates)
    if share is None or share > _unseen_share(work, "optimizer"):
        return 0.0, facts

    lines = tuple(
        replace(each, part="optimizer")
        if each.part == "other" and (each.file, each.function) in facts.own_updates
        else each
        for each in facts.lines
    )
    return share, replace(facts, lines=lines)


def _with_update(work: OwnWork, share: float) -> OwnWork:
    """Return the work with a share of `other` as the optimizer's."""
    if not share:
        return work

    other = work.parts["other"]
    moved = {"other": other * np.float32(1 - share), "optimizer": other * np.float32(share)}
    return replace(work, parts={**work.parts, **moved})


def _counting_update(cost: PhaseCost) -> PhaseCost:
    """Return the cost with what was left out as an update by hand."""
    share = min(cost.share + _unseen_share(cost.work, "optimizer"), 1.0)
    excluded = tuple(name for name in cost.excluded if name != _UPDATE)
    if excluded == cost.excluded:
        return cost

    more = share / cost.share
    return replace(cost, removed=cost.removed * more, saved_ns=cost.saved_ns * more, share=share, excluded=excluded)


def _without_torch(cost: PhaseCost, work: OwnWork, facts: JobFacts) -> PhaseCost:
    """Return the cost of `other` without clearing gradients, and without computation that no hook sees."""
    forward = _unseen_share(work, "forward")
    of_torch = {
        "clearing gradients": clearing_share(facts.lines),
        "the loss": 0.0 if forward else _loss_share(work, facts),
    }
    known = {**of_torch, "the forward": forward, _UPDATE: _unseen_share(work, "optimizer")}
    excluded = {name: share for name, share in known.items() if share >= MIN_EXCLUDED}
    uncounted = sum(excluded.get(name, 0.0) for name in of_torch)
    cost = cost.scaled(max(1 - sum(excluded.values()), 0.0), *excluded)
    return replace(cost, uncounted=uncounted if uncounted < 1 else 0.0)


def _loss_share(work: OwnWork, facts: JobFacts) -> float:
    """Return the share of `other` that is the loss: at most as long as forward, or it is not called once."""
    other, forward = (float(work.parts[part].mean()) if part in work.parts else 0.0 for part in _LOSS_OF)
    return min(loss_share(facts.lines), forward / max(other, 1.0))


def _unseen_share(work: OwnWork, phase: str) -> float:
    """Return the share of `other` that is a phase that no hook sees: at most as long as backward.

    A training without modules has its forward there, one that updates its weights by hand the update.
    """
    if not _is_unseen(work, phase):
        return 0.0

    return min(float(work.parts["backward"].mean()) / max(float(work.parts["other"].mean()), 1.0), 1.0)


def _is_unseen(work: OwnWork, phase: str) -> bool:
    """Return whether the steps have a backward, but not this phase."""
    return phase not in work.parts and "backward" in work.parts
