"""Waiting for data, of a loader or another iterator, and copies to the device, on all ranks."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from traceml.database.schema import Phase
from traceml.diagnosis import advice
from traceml.diagnosis.facts.blamed_lines import blamed_line, main_library, own_line, runs_forward, workers_line
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.findings import Finding, known_facts
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.rules.bottlenecks.phase_cost import PhaseCost, cost_of
from traceml.diagnosis.rules.loading_advice import (
    LoadingAdvice,
    for_input,
    for_iterator,
    of_new_iterators,
    of_sampler,
    with_waited_loader,
)
from traceml.diagnosis.steps.loading import Pipeline, RareWaits, pipeline_of, share_of_long_waits
from traceml.diagnosis.steps.own_work import ITERATOR_SHARE, OwnWork, iterator_wait
from traceml.diagnosis.steps.speedup import speedup
from traceml.formatting import capitalized, percent_text, ranks_text

__all__ = ["input_bound", "iterator_bound", "transfers"]

MIN_PART = 1.05
"""What the advice gains is compared with the gain without any waiting if that is larger by this factor."""


def input_bound(
    work: OwnWork, facts: JobFacts, step_ns: float, excluded: str | None = None, hidden_ns: float = 0.0
) -> list[Finding]:
    """Find waiting for data on all ranks.

    Args:
        step_ns: mean step, to which the cost is compared.
        excluded: waiting that another finding has, and `work` has not, in words.
        hidden_ns: its mean time of a step.
    """
    if "input_wait" not in work.parts:
        return []

    # Two steps are left out: the first batch after a pause is slow in any run.
    cost = cost_of(work, "input_wait", step_ns, rare_share=0)
    if not cost.exceeds():
        return []

    facts = with_waited_loader(facts, cost.saved_ns / step_ns)
    rare = share_of_long_waits(work)
    where = "" if rare is None else f"; most of the waiting is in {percent_text(rare)} of the steps"
    # What steps lose: more than ranks that wait in turns do, less where one that waits little computes more.
    pipeline = pipeline_of(work, facts, cost.saved_ns, step_ns)
    line = cost.line(facts) or cost.line_beside(hidden_ns, facts)
    by_sampler = of_sampler(facts, line)
    cost = cost.reported()
    where = cost.turns_words + where
    if excluded is not None:
        cost = replace(cost, excluded=(*cost.excluded, excluded))

    waits = pipeline or RareWaits.of(work, facts)
    if facts.loader_workers and by_sampler is None:  # the loop's own line tells nothing: the workers have the work
        is_theirs = waits.are_for_samples if isinstance(waits, RareWaits) else not waits.is_handover
        line = workers_line(facts.worker_lines, cost.ranks, waits_are_rare=pipeline is None) if is_theirs else None

    advised = by_sampler or of_new_iterators(facts, pipeline) or for_input(facts, waits, line)
    where += _without_all(cost, advised)
    if line is not None:
        where = where + line.of_batches(facts.loader_workers) if line.of_workers else line.of_it + where

    summary = f"{_subject(cost.ranks)} for data: {cost.of_step}{where}."
    evidence = cost.line_evidence(line) | _loader_evidence(facts) | _fetch_evidence(pipeline, advised)
    return [cost.finding(Kind.INPUT_BOUND, summary, advised.text, evidence, advised.gain)]


def transfers(work: OwnWork, facts: JobFacts, step_ns: float) -> list[Finding]:
    """Find copies to the device that all ranks spend time on."""
    if "h2d" not in work.parts:
        return []

    cost = cost_of(work, "h2d", step_ns, rare_share=0)
    if not cost.exceeds():
        return []

    line = cost.line(facts)
    cost = cost.reported()
    where = (line.of_it if line else "") + cost.turns_words
    untimed = advice.waiting_for_device(facts, is_timed=work.device)
    without = untimed or f"; without them steps would be {cost.faster}"
    summary = f"Copies to the device take {cost.of_step}{where}{without}."
    evidence = cost.line_evidence(line) | _loader_evidence(facts)
    gain = 1.0 if untimed else None
    return [cost.finding(Kind.H2D_BOUND, summary, advice.for_copies(facts), evidence, gain)]


def iterator_bound(work: OwnWork, facts: JobFacts, step_ns: float, long_ns: float = 0.0) -> Finding | None:
    """Find waiting for an iterator that is not a DataLoader, whose time is measured as `other`, a part of the step.

    Args:
        long_ns: mean time of `other` in long steps that another finding has. It may all be waiting for the iterator, as
            for one that collects experience for every n-th step.
    """
    share = _remaining(iterator_wait(work, facts.lines, step_ns), work, long_ns)
    if share < ITERATOR_SHARE:
        return None

    cost = cost_of(work, "other", step_ns, rare_share=0).scaled(share)
    if not cost.exceeds():
        return None

    phase_share = share * float(work.parts["other"].mean()) / step_ns
    lines = _as_code(facts.lines)
    line = own_line(lines, "other", phase_share, cost.ranks)
    seen = line or blamed_line(lines, "other", phase_share, cost.ranks)  # also in a loop of one line, which is not told
    called = main_library(lines, "other", seen) if seen else None
    is_model = line is not None and runs_forward(lines, "other", line)
    advised = for_iterator(facts, cost.saved_ns, step_ns, called, runs_model=is_model)
    where = (line.of_it if line else "") + _without_all(cost, advised)
    summary = f"{_subject(cost.ranks)} for data of an iterator: {cost.of_step}{where}."
    evidence = line.evidence(phase_share) if line else {}
    found = cost.finding(Kind.INPUT_BOUND, summary, advised.text, evidence, advised.gain)
    return replace(found, phase="input_wait")


def _without_all(cost: PhaseCost, advised: LoadingAdvice) -> str:
    """Return how much faster steps would be without any waiting, where the advice gains less; else nothing."""
    whole = speedup(cost.step_ns, cost.saved_ns)
    is_part = advised.gain is not None and whole > MIN_PART * advised.gain
    return f"; without any of it steps would be {cost.faster}" if is_part else ""


def _remaining(share: float, work: OwnWork, long_ns: float) -> float:
    """Return a share of all of `other` as that of what `work` has of it, if the long steps have all that they can."""
    own_ns = float(work.parts["other"].mean())
    return max(share * (own_ns + long_ns) - long_ns, 0.0) / own_ns if own_ns else 0.0


def _as_code(lines: Sequence[SampledLine]) -> list[SampledLine]:
    """Return lines with those of an iterator as `other`, as its time is: what it receives is no loader's batch."""
    names = {"input_wait": "other", "other": Phase.USER.label}
    return [replace(each, part=names.get(each.part, each.part)) for each in lines]


def _subject(ranks: tuple[int, ...]) -> str:
    if not ranks:
        return "The run waits"

    return f"{capitalized(ranks_text(ranks))} {'waits' if len(ranks) == 1 else 'wait'}"


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

    return known_facts(**{name: getattr(facts.loader, name) for name in ("dataset", "num_workers", "in_memory")})
