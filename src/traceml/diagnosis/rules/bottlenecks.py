"""Parts of the step that cost all ranks: waiting for data, copies to the device, code outside the known phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from traceml.database.schema import Phase
from traceml.diagnosis import advice
from traceml.diagnosis.facts.blamed_lines import (
    BlamedLine,
    blamed_line,
    leading_lines,
    main_library,
    workers_line,
)
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.pauses import Saves
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.facts.sampled_shares import (
    MIN_SHARE_SAMPLES,
    NAMED_SHARE,
    clearing_share,
    counted_lines,
    iterator_share,
    loss_share,
    place_share,
)
from traceml.diagnosis.facts.trainings.trainer_calls import calls_trainer, own_line
from traceml.diagnosis.findings import Finding, known_facts
from traceml.diagnosis.kinds import FLOOR_NS, WARNING_SHARE, Kind, least_cost_ns
from traceml.diagnosis.rules.loading_advice import (
    LoadingAdvice,
    for_input,
    for_iterator,
    of_new_iterators,
    of_sampler,
    with_waited_loader,
)
from traceml.diagnosis.steps.loading import Pipeline, RareWaits, pipeline_of, share_of_long_waits
from traceml.diagnosis.steps.own_work import COMPUTE, UNNAMED_CODE, OwnWork
from traceml.diagnosis.steps.speedup import saved_ns, speedup, without_rare
from traceml.diagnosis.steps.step_split import Floats
from traceml.formatting import (
    bytes_text,
    capitalized,
    gain_text,
    ns_text,
    percent_text,
    phase_words,
    place_words,
    ranks_text,
)

__all__ = ["checkpoints", "input_bound", "residual", "transfers"]

ITERATOR_SHARE = 0.5
"""Code outside the phases is waiting for an iterator if this share of its samples is."""
UNSURE_SHARE = 0.20
"""Code outside the phases is reported from this share on with too few cores, or too few samples to know where it is."""
RARE_FACTOR = 1.1
"""Rare long steps are not counted if a part costs more than this factor with them."""
_TURNS_RATIO = 1.5
"""Ranks have a part in turns if steps lose this many times the mean of the rank with most of it,"""
_NOT_IN_TURN_SHARE, _TURNS_STEPS = 0.25, 0.7
"""and half of the ranks have less than this share of the longest, in this share of the steps."""
MIN_EXCLUDED = 0.02
"""What does not count is named from this share of the part on."""
MIN_PART = 1.05
"""What the advice gains is compared with the gain without any waiting if that is larger by this factor."""
_RARE, _UPDATE = "rare long steps", "the update"
_LITTLE_UPDATE = 0.1
"""Functions that read gradients and have less of `other` are not all of an update by hand."""
_MAY_UPDATE = ", which may be the update: no optimizer is called in the steps."
_LOSS_OF = ("other", "forward")
_PASSES, _GRAPH_RATIO = ("forward", "backward"), 5.0
"""Backward of the model alone takes fewer times as long as forward, also where activations are computed again."""
TURNS_FACTOR = 1.5
"""Ranks save one after the other if a step becomes longer by this many times what one of them takes."""
SAVING_SHARE = 1 / 3
"""A rank saves if it takes this share of the time of the one that saves longest."""


class _PhaseCost(msgspec.Struct, frozen=True):
    """Cost of a part of the step."""

    work: OwnWork
    part: str
    step_ns: float
    ranks: tuple[int, ...]  # the ranks that have it; empty for all
    removed: Floats  # the work that a run without it would not do, rank x step
    saved_ns: float  # time by which the mean step would be shorter
    share: float = 1.0  # share of the part that counts; the rest is other things
    excluded: tuple[str, ...] = ()  # what of the part does not count, in words
    with_rare: OwnWork | None = None  # the same with the long steps that another finding has, which samples are of, too
    hidden_ns: float = 0.0  # the mean of the part that another finding has, as of collections; samples are of it, too
    uncounted: float = 0.0  # share of the part that is torch's and does not count; samples of lines are of it, too

    def exceeds(self, share: float = WARNING_SHARE) -> bool:
        """Return whether it costs at least this share of the step, and at least `FLOOR_NS`."""
        return self.saved_ns >= least_cost_ns(self.step_ns, share)

    def scaled(self, share: float, *excluded: str) -> _PhaseCost:
        """Return a share of it; the rest is what `excluded` names."""
        return replace(
            self, removed=self.removed * share, saved_ns=self.saved_ns * share, share=share, excluded=excluded
        )

    def with_update(self) -> _PhaseCost:
        """Return the cost with what was left out as an update by hand."""
        share = min(self.share + _unseen_share(self.work, "optimizer"), 1.0)
        excluded = tuple(name for name in self.excluded if name != _UPDATE)
        if excluded == self.excluded:
            return self

        more = share / self.share
        return replace(self, removed=self.removed * more, saved_ns=self.saved_ns * more, share=share, excluded=excluded)

    def reported(self) -> _PhaseCost:
        """Return the cost with the rare long steps, as a screen shows the part; without them if they are much of it."""
        values = self.work.parts[self.part]
        removed = values * np.float32(self.share)
        saved = saved_ns(self.work, {self.part: values - removed})
        if saved > RARE_FACTOR * self.saved_ns:
            return replace(self, excluded=(_RARE, *self.excluded))

        return replace(self, removed=removed, saved_ns=max(saved, self.saved_ns))

    @property
    def of_step(self) -> str:
        """The cost in words: `20.4 ms of each 31 ms step (65 %)`."""
        share = percent_text(self.saved_ns / self.step_ns)
        # Ranks that have it in turns wait for each other: a step loses more than the mean of each.
        lost_ns = max(float(self.removed.mean()), self.saved_ns)
        less = f", not counting {' and '.join(self.excluded)}" if self.excluded else ""
        return f"{ns_text(lost_ns)} of each {ns_text(self.step_ns)} step ({share}{less})"

    @property
    def in_turns(self) -> bool:
        """Whether ranks have it in turns: half of them have little in most steps, and it costs more than the mean."""
        by_rank = self.removed.mean(axis=1)
        if self.ranks or len(by_rank) < 2 or self.saved_ns < _TURNS_RATIO * float(by_rank.max()):
            return False

        little = self.removed < _NOT_IN_TURN_SHARE * self.removed.max(axis=0)
        return float((little.mean(axis=0) >= 0.5).mean()) >= _TURNS_STEPS

    @property
    def turns_words(self) -> str:
        """That in words: `, by the ranks in turns (each spends 20.7 ms per step on average)`; empty if it is not so."""
        mean_ns = float(self.removed.mean())
        return f", by the ranks in turns (each spends {ns_text(mean_ns)} per step on average)" if self.in_turns else ""

    @property
    def faster(self) -> str:
        """The gain in words: `2.9x faster`."""
        return gain_text(speedup(self.step_ns, self.saved_ns))

    def line(self, facts: JobFacts) -> BlamedLine | None:
        """Return the line of the user's code that most of it is spent in, where the samples show it."""
        line = self.sampled_line(facts)
        return None if line is None or calls_trainer(facts.lines, line) else line

    def line_beside(self, hidden_ns: float, facts: JobFacts) -> BlamedLine | None:
        """Return the line that most of it is spent in, where none of what another finding has is."""
        own = self._phase_share * self.step_ns
        line = own_line(facts.lines, self.part, self._phase_share + hidden_ns / self.step_ns, self.ranks)
        return None if line is None else replace(line, share=min(line.share * (own + hidden_ns) / max(own, 1.0), 1.0))

    def leading_lines(self, facts: JobFacts) -> tuple[BlamedLine, ...]:
        """Return the two lines that most of it is spent in together, where the samples show them."""
        share = self._share_in(self.with_rare or self.work) * (1 - self.uncounted)
        return leading_lines(self._counted(facts), self.part, share)

    def sampled_line(self, facts: JobFacts) -> BlamedLine | None:
        """Return the line that most of it is spent in, also if it only calls a trainer."""
        sampled_share = self._phase_share * (1 - self.uncounted) + self.hidden_ns / self.step_ns
        return self._without_hidden(blamed_line(self._counted(facts), self.part, sampled_share, self.ranks))

    def _counted(self, facts: JobFacts) -> Sequence[SampledLine]:
        return counted_lines(facts.lines) if self.uncounted else facts.lines

    def _without_hidden(self, line: BlamedLine | None) -> BlamedLine | None:
        """Return a line with its share if all that is hidden was in it; None if that is not most of the part."""
        own = self._phase_share * self.step_ns
        if line is None or not self.hidden_ns or own <= 0:
            return line

        share = (line.share * (own + self.hidden_ns) - self.hidden_ns) / own
        return replace(line, share=share) if share >= NAMED_SHARE else None

    @property
    def _phase_share(self) -> float:
        return self._share_in(self.work)

    def _share_in(self, work: OwnWork) -> float:
        return float(work.parts[self.part].mean()) / self.step_ns

    def line_evidence(self, line: BlamedLine | None) -> dict[str, object]:
        """Return the evidence about that line."""
        return line.evidence(self.saved_ns / self.step_ns) if line else {}

    def finding(
        self, kind: Kind, summary: str, action: str, evidence: Mapping[str, object], gain: float | None = None
    ) -> Finding:
        """Return the finding; its gain is that without any of the cost, unless it is given."""
        return Finding.of(
            kind,
            ranks=self.ranks,
            phase=self.part,
            summary=summary,
            next=action,
            evidence={**_evidence(self.work, self.part, self.step_ns), **evidence},
            cost_share=self.saved_ns / self.step_ns,
            speedup_if_fixed=speedup(self.step_ns, self.saved_ns) if gain is None else gain,
        )


def input_bound(
    work: OwnWork, facts: JobFacts, step_ns: float, excluded: str | None = None, hidden_ns: float = 0.0
) -> list[Finding]:
    """Find waiting for data on all ranks.

    Args:
        step_ns: mean step, to which the cost is compared.
        excluded: waiting that another finding has, and `work` has not, in words.
        hidden_ns: its mean time of a step.
    """
    # Two steps are left out: the first batch after a pause is slow in any run.
    cost = _cost(work, "input_wait", step_ns, rare_share=0)
    if cost is None or not cost.exceeds():
        return []

    facts = with_waited_loader(facts, cost.saved_ns / step_ns)
    rare = share_of_long_waits(work)
    where = "" if rare is None else f"; most of the waiting is in {percent_text(rare)} of the steps"
    pipeline = pipeline_of(work, facts, float(cost.removed.mean()), step_ns)
    line = cost.line(facts) or cost.line_beside(hidden_ns, facts)
    by_sampler = of_sampler(facts, line)
    cost = cost.reported()
    if excluded is not None:
        cost = replace(cost, excluded=(*cost.excluded, excluded))

    waits = pipeline or RareWaits.of(work, facts)
    if facts.loader_workers and by_sampler is None:  # the loop's own line tells nothing: the workers have the work
        is_theirs = waits.are_for_samples if isinstance(waits, RareWaits) else not waits.is_handover
        line = workers_line(facts.worker_lines, cost.ranks, waits_are_rare=pipeline is None) if is_theirs else None

    advised = by_sampler or of_new_iterators(facts, pipeline) or for_input(facts, waits, line)
    is_part = advised.gain is not None and speedup(step_ns, cost.saved_ns) > MIN_PART * advised.gain
    where += f"; without any of it steps would be {cost.faster}" if is_part else ""
    if line is not None:
        where = where + line.of_batches(facts.loader_workers) if line.of_workers else line.of_it + where

    summary = f"{_subject(cost.ranks)} for data: {cost.of_step}{where}."
    evidence = cost.line_evidence(line) | _loader_evidence(facts) | _fetch_evidence(pipeline, advised)
    return [cost.finding(Kind.INPUT_BOUND, summary, advised.text, evidence, advised.gain)]


def transfers(work: OwnWork, facts: JobFacts, step_ns: float) -> list[Finding]:
    """Find copies to the device that all ranks spend time on."""
    cost = _cost(work, "h2d", step_ns, rare_share=0)
    if cost is None or not cost.exceeds():
        return []

    line = cost.line(facts)
    cost = cost.reported()
    where = line.of_it if line else ""
    summary = f"Copies to the device take {cost.of_step}{where}; without them steps would be {cost.faster}."
    evidence = cost.line_evidence(line) | _loader_evidence(facts)
    return [cost.finding(Kind.H2D_BOUND, summary, advice.for_copies(facts), evidence)]


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
    has_update = _is_unseen(work, "optimizer") and update < _LITTLE_UPDATE
    update, facts = (0.0, facts) if has_update else (update, facts_with_update)
    work, whole = _with_update(work, update), None if whole is None else _with_update(whole, update)
    for part in work.parts:
        if part in known:
            continue

        if part == "other" and (waiting := _iterator_bound(work, facts, step_ns)):
            found.append(waiting)
            continue

        cost = _cost_of_code(work, part, facts, step_ns, update)
        if cost is None:
            continue

        cost = replace(cost, hidden_ns=(hidden_ns or {}).get(part, 0.0))
        if whole is not None and _RARE not in cost.excluded and _is_longer(whole, work, part):
            cost = replace(cost, excluded=(_RARE, *cost.excluded), with_rare=whole)

        found += _residual_finding(cost, facts, has_update=part == "other" and has_update)

    return found


def _cost_of_code(work: OwnWork, part: str, facts: JobFacts, step_ns: float, update_share: float) -> _PhaseCost | None:
    """Return the cost of a part that is the script's own code; None if it is too small to be reported."""
    # A named phase explains its rare long steps; those of unnamed code are jitter.
    cost = _cost(work, part, step_ns, rare_share=0.05 if part in UNNAMED_CODE else 0)
    if cost is None:
        return None

    if part == "other":
        cost = _without_torch(cost, work, facts)
        cost = replace(cost, excluded=(*cost.excluded, _UPDATE)) if update_share >= MIN_EXCLUDED else cost

    unsure = part in UNNAMED_CODE and facts.oversubscribed
    return cost.reported() if cost.exceeds(UNSURE_SHARE if unsure else WARNING_SHARE) else None


def _residual_finding(cost: _PhaseCost, facts: JobFacts, *, has_update: bool) -> list[Finding]:
    """Return the finding about a cost and its place; none if it may be a wait for a core, or its place is not known."""
    line, sampled = cost.line(facts), cost.sampled_line(facts)
    library = None if sampled is None else main_library(facts.lines, cost.part, sampled)
    two = cost.leading_lines(facts) if line is None and library is None else ()
    is_known = cost.part not in UNNAMED_CODE or line or library or two
    if not is_known and (facts.is_core_wait(cost.saved_ns / cost.step_ns) or _is_unsure(cost, facts)):
        return []

    waits = line is not None and facts.waits_in(cost.part, line)
    has_forward = cost.part == "other" and _is_unseen(cost.work, "forward")
    is_update = (has_update and not has_forward and library is None) and line is not None and not waits
    cost = cost.with_update() if is_update else cost
    where = phase_words(cost.part) + (line.of_it if line else f", most of it in {library}" if library else "")
    if line and library == advice.EVENT_LOOP:
        where += ", where the event loop waits because no task can run"

    where += cost.turns_words
    line_share = 1.0 if line is None or line.is_rough else line.share
    gain = 1.0 if is_update else speedup(cost.step_ns, cost.saved_ns * line_share)
    what = "that part" if line_share < 1.0 else "it"
    # What is waited for, as a batch that a thread makes, may take as long elsewhere.
    faster = gain_text(gain, "at most") if waits else gain_text(gain)
    without = _MAY_UPDATE if is_update else f"; without {what} steps would be {faster}."
    summary = f"{cost.of_step} is spent in {where}{without}"
    leading = advice.LeadingLines(two, "it" if cost.with_rare is None else f"it and the {_RARE}") if two else None
    text = advice.for_residual(
        cost.part,
        line,
        facts,
        library,
        has_forward=has_forward,
        is_update=is_update,
        makes_graph=cost.part == "other" and _makes_graph(cost.work),
        trainer=sampled if line is None and library is None else None,
        two=leading,
    )
    text += advice.IN_SAME_STEPS if cost.in_turns else ""
    evidence = cost.line_evidence(line) | known_facts(in_turns=cost.in_turns or None)
    return [cost.finding(Kind.RESIDUAL_HEAVY, summary, text, evidence, gain)]


def _makes_graph(work: OwnWork) -> bool:
    """Return whether backward takes far longer than the model's forward: it follows other operations, as of a loss."""
    forward, backward = (float(work.parts[part].mean()) if part in work.parts else 0.0 for part in _PASSES)
    return not work.device and 0.0 < _GRAPH_RATIO * forward <= backward


def _is_unsure(cost: _PhaseCost, facts: JobFacts) -> bool:
    """Return whether it costs little, and was seen too seldom to know where: each loop has some code of its own."""
    seen = sum(each.samples for each in facts.lines if each.part == cost.part)
    return bool(facts.lines) and seen < MIN_SHARE_SAMPLES and not cost.exceeds(UNSURE_SHARE)


def _own_update(work: OwnWork, facts: JobFacts) -> tuple[float, JobFacts]:
    """Return the share of `other` that updates weights by hand, and the facts with its lines as the optimizer's.

    It is that of the functions that read gradients, by samples; none where backward is shorter: they do more than that.
    """
    if not facts.own_updates or not _is_unseen(work, "optimizer") or "other" not in work.parts:
        return 0.0, facts

    share = place_share(facts.lines, "other", facts.own_updates)
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


def _is_longer(whole: OwnWork, work: OwnWork, part: str) -> bool:
    return float(whole.parts[part].mean()) > RARE_FACTOR * float(work.parts[part].mean())


def _without_torch(cost: _PhaseCost, work: OwnWork, facts: JobFacts) -> _PhaseCost:
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


def _iterator_bound(work: OwnWork, facts: JobFacts, step_ns: float) -> Finding | None:
    """Find waiting for an iterator that is not a DataLoader, whose time is measured as `other`."""
    share = iterator_share(facts.lines)
    measured = work.parts.get("input_wait")
    if share < ITERATOR_SHARE or (measured is not None and measured.mean() > 0.01 * step_ns):
        return None

    whole = _cost(work, "other", step_ns, rare_share=0)
    if whole is None:
        return None

    cost = whole.scaled(share)
    if not cost.exceeds():
        return None

    phase_share = share * float(work.parts["other"].mean()) / step_ns
    lines = _as_code(facts.lines)
    line = own_line(lines, "other", phase_share, cost.ranks)
    called = main_library(lines, "other", line) if line else None
    advised = for_iterator(facts, float(cost.removed.mean()), step_ns, called)
    is_part = advised.gain is not None and speedup(step_ns, cost.saved_ns) > MIN_PART * advised.gain
    without = f"; without any of it steps would be {cost.faster}" if is_part else ""
    summary = f"{_subject(cost.ranks)} for data of an iterator: {cost.of_step}{line.of_it if line else ''}{without}."
    evidence = line.evidence(phase_share) if line else {}
    found = cost.finding(Kind.INPUT_BOUND, summary, advised.text, evidence, advised.gain)
    return replace(found, phase="input_wait")


def _as_code(lines: Sequence[SampledLine]) -> list[SampledLine]:
    """Return lines with those of an iterator as `other`, as its time is: what it receives is no loader's batch."""
    names = {"input_wait": "other", "other": Phase.USER.label}
    return [replace(each, part=names.get(each.part, each.part)) for each in lines]


def checkpoints(work: OwnWork, facts: JobFacts, step_ns: float) -> list[Finding]:
    """Find saving that all ranks spend time on, or wait for."""
    values = work.parts.get("checkpoint")
    if values is None:
        return []

    # In the window's last step scripts save and end.
    longest = values[:, :-1].max(axis=0, initial=0)
    saves = longest > FLOOR_NS
    kept = np.concatenate([np.zeros_like(values[:, :-1]), values[:, -1:]], axis=1)
    ranks, removed = _ranks_with(work, values[:, :-1]), values - kept
    turns_ns = _saving_in_turns_ns(work, saves, longest)
    saved = saved_ns(work, {"checkpoint": kept}) if turns_ns is None else turns_ns.sum() / len(work.step)
    cost = _PhaseCost(work, "checkpoint", step_ns, ranks, removed, float(saved))
    if saves.sum() < 2 or not cost.exceeds():
        return []

    count, each_ns = int(saves.sum()), float((longest[saves] if turns_ns is None else turns_ns).mean())
    known, half = facts.pauses.saves(work.ranks), speedup(step_ns, cost.saved_ns / 2)
    where = f" on {ranks_text(ranks)}" if ranks else ""
    where += "" if turns_ns is None else ", one rank after the other"
    line = _within_save(cost.line(facts), known)
    summary = (
        f"Saving takes {percent_text(cost.saved_ns / step_ns)} of step time: {count} of {len(saves)} steps save{where}"
        f", for {ns_text(each_ns)} each{_of_save(known, line)}{_at_end(values)}; without it steps would be "
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


def _at_end(values: Floats) -> str:
    """Return that a save in the last step does not count, where screens show its time, too."""
    return ", not counting the one in the last step" if values[:, -1].max(initial=0) > FLOOR_NS else ""


def _ranks_with(work: OwnWork, values: Floats) -> tuple[int, ...]:
    """Return the ranks that have a part, where others do not; empty for all."""
    sums = values.sum(axis=1)
    rows = np.flatnonzero(sums >= SAVING_SHARE * sums.max())
    return () if len(rows) == len(sums) else tuple(work.ranks_of(rows))


def _within_save(line: BlamedLine | None, known: Saves | None) -> BlamedLine | None:
    """Return the line that most of saving is in, where that is not the one that calls it, as in a trainer's hook."""
    if line is None or known is None:
        return line

    called = (known.file, known.function) == (line.file, line.function)
    return None if called else line


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


def _cost(work: OwnWork, part: str, step_ns: float, *, rare_share: float) -> _PhaseCost | None:
    """Return the cost of a part without its rare long steps; None if there is no such part.

    A part that only half of the ranks or fewer have saves nothing: stragglers are a finding of their own.
    """
    values = work.parts.get(part)
    if values is None:
        return None

    removed = without_rare(values, rare_share)
    means = removed.mean(axis=1)
    has = means >= 0.5 * float(np.max(means, initial=0))
    saved = saved_ns(work, {part: values - removed}) if has.mean() > 0.5 else 0.0
    ranks = work.named(has)
    return _PhaseCost(work, part, step_ns, ranks, removed, saved)


def _subject(ranks: tuple[int, ...]) -> str:
    if not ranks:
        return "The run waits"

    return f"{capitalized(ranks_text(ranks))} {'waits' if len(ranks) == 1 else 'wait'}"


def _evidence(work: OwnWork, part: str, step_ns: float) -> dict[str, object]:
    values = work.parts[part]
    means = values[:16].mean(axis=1) / 1e6
    return {
        "step_ms": step_ns / 1e6,
        "phase_ms": float(values.mean()) / 1e6,
        "phase_p50_ms": float(np.median(values)) / 1e6,
        "phase_ms_by_rank": {
            str(rank): float(mean) for rank, mean in zip(work.ranks[:16].tolist(), means, strict=True)
        },
        "compute_ms": work.compute_ns / 1e6,
        "steps": values.shape[1],
    }


def _fetch_evidence(pipeline: Pipeline | None, advised: LoadingAdvice) -> dict[str, object]:
    if pipeline is None:
        return {}

    return {
        "fetch_ms": pipeline.fetch_ns / 1e6,
        **known_facts(
            fetch_cpu_share=pipeline.fetch_cpu if pipeline.is_cpu_known else None, worker_cores=pipeline.worker_cores
        ),
        "speedup_with_data_ready": pipeline.gain_with(0.0, workers=0),
        **known_facts(workers_advised=advised.workers),
    }


def _loader_evidence(facts: JobFacts) -> dict[str, object]:
    if facts.loader is None:
        return {}

    described = {name: getattr(facts.loader, name) for name in ("dataset", "num_workers", "in_memory")}
    return {name: value for name, value in described.items() if value is not None}
