"""Findings about runs that show too little for a verdict: too few steps, or backward of which a part is waiting."""

from __future__ import annotations

from traceml.database.states import RunStatus
from traceml.diagnosis.advice import EMPTY_DATA_SET
from traceml.diagnosis.facts.blamed_lines import PROCESSES, PROGRAMS, calls_code, line_beside_imports, outside_line
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.sampled_lines import OUTSIDE_STEPS
from traceml.diagnosis.facts.sampled_shares import import_share
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.rules.no_bottleneck import shares_text
from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.diagnosis.steps.own_work import OwnWork, own_work_of
from traceml.formatting import count_text, ns_text, percent_text, plural

__all__ = ["MIN_STEPS", "awaits_rows", "too_few_ranks", "too_few_steps", "unknown_backward"]

MIN_STEPS = 20
"""Fewer steps than this, after the first ones, are too few for a diagnosis."""
_ALL_RANKS_NS = 1e9  # of step time: rows of all ranks come once a second
_SHOWN_STEPS = 3  # of so many the summary says what took their time
_UNKNOWN_SHARE = 0.30
_NAMED_IMPORTS = 0.1  # of a run without steps, imports are named from this share of its time on
_TO_TRACE = "To trace it too, start it by `traceml run`, or call traceml.init(local=True) before training."
_TO_INHERIT = (
    "If that one trains, it was not traced: start it by the same Python, with the script's environment (env=None, or "
    "os.environ with more), or let `traceml run` start it itself."
)
_TO_FIND = (
    "If that one trains, it has a run and a verdict of its own (`traceml runs`). A class that overrides Process.run "
    "has to call traceml.init() there."
)
_TO_LAUNCH = (
    "The script runs functions by traceml.launch: with trace=True their run has steps and a verdict of its own."
)
_WHEN_FAILED = "Read the job's output to see why it failed before it trained."


def too_few_steps(window: AlignedSteps, facts: JobFacts) -> Finding:
    """Return the finding about a run with fewer than `MIN_STEPS` steps: why, and what its start-up does."""
    seen = len(window)
    began = len(window.ranks) > 0
    why = f"only {seen} step{'s' if seen > 1 else ''} after the first ones"
    if not seen:
        ranks = f"the {len(window.ranks)} ranks have no step in common" if len(window.ranks) > 1 else "no step"
        why = f"{ranks} after the first ones" if began else "no step was seen"

    ended = facts.state != RunStatus.RUNNING
    failed = not began and facts.state == RunStatus.FAILED
    if not began and facts.state == RunStatus.STOPPED:
        why = "the run was stopped before its first step"
    if is_untraced := facts.only_logs and not began:
        why = "the script only logs, its steps are not traced"

    advice = _for_ended(facts, began=began) if ended else _for_running(seen, facts, began=began)
    so_far = shares_text(own_work_of(window, facts), facts) if seen >= _SHOWN_STEPS else ""
    line = line_beside_imports(facts.lines, OUTSIDE_STEPS[0]) if ended and not (began or is_untraced) else None
    if line is not None:
        imports = import_share(facts.lines, OUTSIDE_STEPS[0]).share
        so_far = f" {line.share_text.capitalize()} of the run's time is in {line.place}."
        if imports >= _NAMED_IMPORTS:
            beside = f"Beside imports, which take {percent_text(imports)} of the run's time"
            so_far = f" {beside}, {line.share_text} of the rest is in {line.place}."

        advice = f"If the run should be faster, look at {line.place}. {advice}"
        if calls_code(facts.lines, OUTSIDE_STEPS[0], line, PROGRAMS):
            advice = f"{line.place} waits for a program that it starts. {_TO_INHERIT}"
        elif calls_code(facts.lines, OUTSIDE_STEPS[0], line, PROCESSES):
            advice = f"{line.place} waits for a process that the script has started. {_TO_FIND}"

    return Finding.of(
        Kind.INSUFFICIENT_DATA,
        summary=f"Too few steps for a verdict: {why}; {MIN_STEPS} are needed.{so_far}",
        next=_WHEN_FAILED if failed else _TO_TRACE if is_untraced else advice,
        evidence={
            "steps": seen,
            "needed": MIN_STEPS,
            "missing": "steps",
            **({} if line is None else line.evidence(1.0)),
        },
    )


def _for_running(seen: int, facts: JobFacts, *, began: bool) -> str:
    """Return what a running job is doing until there are enough steps."""
    if began:
        return f"Wait for more steps: {seen} of {MIN_STEPS} so far, after the first ones."

    mostly = _most_of_start_up(facts)
    return f"Wait for the first step; so far the start-up is mostly {mostly}." if mostly else "Wait for the first step."


def _most_of_start_up(facts: JobFacts) -> str:
    """Return what most of the start-up is: `imports in train.py:3`; empty if unknown."""
    startup = OUTSIDE_STEPS[0]
    line = outside_line(facts.lines, startup)
    imports = ["imports"] if import_share(facts.lines, startup).is_most else []
    return " ".join([*imports, *([] if line is None else [f"in {line.place}"])])


def _for_ended(facts: JobFacts, *, began: bool) -> str:
    if facts.state == RunStatus.LOST:
        return "The aggregator ended before the run. `traceml sync` stores steps that its ranks left, if there are any."

    if began:
        return f"Let the run make at least {MIN_STEPS + 10} training steps."

    mostly = _most_of_start_up(facts) if facts.state == RunStatus.STOPPED else ""
    if mostly:
        return f"Let the run come to its training: the start-up was mostly {mostly}."

    if facts.launches:
        return _TO_LAUNCH

    if without_batch := _without_batch(facts):
        return without_batch

    return (
        "If the script trains without a torch optimizer or in a way that is not recognized, mark its steps with "
        "traceml.trace_step()."
    )


def _without_batch(facts: JobFacts) -> str:
    """Return advice where the data loader had no batch to give; empty if it may have had one."""
    loader = facts.loader
    samples = None if loader is None else loader.samples_of_rank(facts.world_size)
    if loader is None or samples is None:
        return ""

    if not samples:
        return EMPTY_DATA_SET

    if not loader.drop_last or loader.batch_size is None or samples >= loader.batch_size:
        return ""

    return (
        f"{plural(samples, 'sample')} of the data set make no whole batch of {count_text(loader.batch_size)}, and "
        "drop_last=True leaves out what is not whole: use smaller batches, or drop_last=False."
    )


def awaits_rows(finding: Finding) -> bool:
    """Whether a finding only waits for the first steps: more rows change it."""
    return finding.kind is Kind.INSUFFICIENT_DATA and finding.evidence.get("missing") in ("steps", "ranks")


def too_few_ranks(window: AlignedSteps, facts: JobFacts) -> Finding | None:
    """Return the finding about a running job of which some ranks have sent no step; None after a second of steps.

    Ranks send their rows once a second: at first some are there, whose waiting says nothing without the others.
    """
    seen = sum(step >= 0 for step in facts.latest[: facts.world_size])
    lasted_ns = float(window.total.mean(axis=0).sum())
    if facts.state != RunStatus.RUNNING or not 0 < seen < facts.world_size or lasted_ns >= _ALL_RANKS_NS:
        return None

    return Finding.of(
        Kind.INSUFFICIENT_DATA,
        summary=(
            f"Too few ranks for a verdict: steps of {count_text(seen)} of {count_text(facts.world_size)} ranks were "
            "seen."
        ),
        next="Wait for the first steps of the others.",
        evidence={
            "steps": len(window),
            "needed": MIN_STEPS,
            "missing": "ranks",
            "ranks_seen": seen,
            "world_size": facts.world_size,
        },
    )


def unknown_backward(window: AlignedSteps, work: OwnWork) -> Finding | None:
    """Report that own backward was not measured: slow computation and slow communication look the same then."""
    if work.backward_known:
        return None

    backward = float(window.times["backward"].mean())
    share = backward / work.step_ns
    if share < _UNKNOWN_SHARE:
        return None

    return Finding.of(
        Kind.INSUFFICIENT_DATA,
        phase="backward",
        summary=(
            f"{ns_text(backward)} of each {ns_text(work.step_ns)} step ({percent_text(share)}) is backward or "
            "communication: the ranks' own backward work was not measured, so the two cannot be separated."
        ),
        next="Compare with a run on one rank: its backward is computation, the rest is communication.",
        evidence={"backward_ms": backward / 1e6, "step_ms": work.step_ns / 1e6, "missing": "backward_own_ns"},
    )
