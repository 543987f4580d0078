"""Parts of the run's wall time outside the steps: a long start-up, much evaluation, code after the last step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from traceml.database.schema import LINE_AFTER_STEPS, LINE_OUTSIDE, LINE_PHASES, Phase
from traceml.database.states import RunStatus
from traceml.diagnosis.facts.blamed_lines import (
    COLLECTIVES,
    TORCH,
    BlamedLine,
    calls_code,
    of_longest_startup,
    outside_line,
    unless_trainer,
    workers_line,
)
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.run_time import HEAVY_SHARE, EvaluationParts, RunTime
from traceml.diagnosis.facts.sampled_lines import OUTSIDE_STEPS, SampledLine
from traceml.diagnosis.facts.sampled_shares import (
    NAMED_SHARE,
    SampledShare,
    child_wait_share,
    import_share,
    worker_wait_share,
)
from traceml.diagnosis.facts.trainings.models_and_loaders import LoaderFacts
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import WARNING_SHARE, Kind, Severity
from traceml.diagnosis.rules.loading_advice import for_evaluation
from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.diagnosis.steps.own_work import is_grouped
from traceml.diagnosis.steps.speedup import speedup_of_share
from traceml.formatting import capitalized, count_text, duration_text, factor_text, part_words, percent_text, ranks_text

__all__ = ["outside_steps", "uncovered_time_text"]

STARTUP_S = 5.0
"""A shorter start-up is not reported."""
AFTER_STEPS_S = 5.0
"""Less time after the last step is not reported: processes need some to end."""
LONG_STARTUP_S = 60.0
"""From here on a long start-up is a warning, without its waiting for a core."""
_REPORTED_WAIT = 0.25
"""Share of the start-up from which on waiting for a core is reported."""
_REPORTED_SET_UP = 0.1
"""Share of the start-up from which on compiling, waiting for data, or other set-up in the first steps is reported."""
_MOST = 0.5
"""Share of the start-up from which on waiting for data is its cause."""
_REPORTED_SHORT = 0.05
"""Share of the evaluation from which on short ones, next to those that are counted, are mentioned."""
_REPEATED_SHARE = 0.5
"""Share of the evaluation that comes several times, from which on it can be rarer."""


def outside_steps(window: AlignedSteps, facts: JobFacts, *, hung: bool = False) -> list[Finding]:
    """Return the findings about the run's time outside of its steps; none where that is not known.

    Args:
        window: aligned steps, which show whether ranks wait for those that evaluate alone.
        hung: whether the job hung: it may have done so between two steps.
    """
    time, lines = facts.time, facts.lines
    if time is None:
        return []

    found = []
    startup_s = time.seconds.get("startup", 0.0)
    # A script that ended well without a step trains in a way that is not recognized, if at all.
    has_begun, is_running = time.share("steps", "evaluation") > 0, facts.state == RunStatus.RUNNING
    # A first step may be open, by what was seen after its first batch: its begin is known only with its end.
    before = (*OUTSIDE_STEPS, Phase.INPUT_WAIT.label)
    is_known = has_begun or not (
        facts.state == RunStatus.FINISHED or (is_running and any(each.part not in before for each in lines))
    )
    if is_known and startup_s >= max(STARTUP_S, HEAVY_SHARE * time.wall_s):
        startup = _startup(time, startup_s, facts)
        # While the training continues, its share becomes less.
        found.append(replace(startup, severity=Severity.INFO) if is_running and has_begun else startup)

    alone = time.evaluators if time.evaluators and is_grouped(window, facts) else ()
    evaluation_s = time.evaluators_s if alone else time.seconds.get("evaluation", 0.0)
    # With ranks that evaluate alone, it is waiting in the steps of the others; a start-up is long in short runs only.
    is_longest = evaluation_s > time.in_steps * time.wall_s > 0
    least = WARNING_SHARE if alone or is_longest else HEAVY_SHARE
    # Else the training that it belongs to continues, or follows.
    is_typical = not is_running or time.repeated_evaluation(evaluation_s) >= _REPEATED_SHARE
    if is_typical and evaluation_s >= least * time.wall_s > 0:
        line = unless_trainer(lines, outside_line(lines, "outside"))
        plays = facts.plays and not alone and not time.evaluates_only_first
        found.append(_play(time, line) if plays else _evaluation(time, evaluation_s, line, alone, facts))

    # A step in which the run ended or hung is no code after the steps.
    is_open = facts.state != RunStatus.FINISHED and any(each.in_step for each in facts.exits)
    after = None if is_open or hung else outside_line(lines, LINE_AFTER_STEPS)  # None while it runs
    after_s, is_most = time.seconds.get("idle", 0.0), time.share("idle") >= max(HEAVY_SHARE, time.in_steps)
    if after is not None and time.in_steps > 0 and after_s >= AFTER_STEPS_S and is_most:
        found.append(_after_steps(time, after_s, after))

    return found


def _after_steps(time: RunTime, seconds: float, line: BlamedLine) -> Finding:
    """Return the finding about code after the last step that takes longer than all steps."""
    share = time.share("idle")
    return Finding.of(
        Kind.AFTER_STEPS,
        severity=Severity.WARNING,
        summary=(
            f"{duration_text(seconds)} of the run's {duration_text(time.wall_s)} ({percent_text(share)}) passed after "
            f"the last step{line.of_it}; all steps together took {percent_text(time.in_steps)}."
        ),
        next=f"Look at {line.place}: make it cheaper, or run it apart from the training.",
        evidence={"after_s": seconds, "wall_s": time.wall_s, "share": share, **line.evidence(share)},
        cost_share=share,
        speedup_if_fixed=speedup_of_share(line.share * share),
    )


def _startup(time: RunTime, startup_s: float, facts: JobFacts) -> Finding:
    lines = of_longest_startup(facts.lines)
    line, imports = outside_line(lines, "startup"), import_share(lines, "startup")
    is_first = time.share("restart") == 0
    data_share = min(time.first_data_s / startup_s, 1.0) if is_first else 0.0
    if data_share >= _MOST:
        more = f", after {duration_text(time.first_data_s)} of waiting for data"
        summary = f"{_began_text(time, startup_s, more)}."
        return _startup_finding(time, startup_s, summary, _FOR_FIRST_DATA, {"first_data_s": time.first_data_s})

    if is_first and max(time.compile_s, time.set_up_s) >= _REPORTED_SET_UP * startup_s:
        return _slow_first_steps(time, startup_s)

    children = child_wait_share(lines)
    if children.is_most:
        return _awaiting_startup(time, startup_s, children, line)

    mostly_imports = imports.is_most
    of_line = line.of_it + _of_ranks(lines, facts) if line else ""
    where = f", {imports.text} of it in imports" if mostly_imports else of_line
    if data_share >= _REPORTED_SET_UP:  # these shares are of the time before that
        where = f", {duration_text(time.first_data_s)} of it waiting for data"
    # Read once or twice a second: the last reading may be of the first step, and what ran took its time on any core.
    waited_s = max(min(facts.startup_wait_s, startup_s - facts.startup_run_s), 0.0)
    waited = waited_s / startup_s
    oversubscribed = waited >= _REPORTED_WAIT
    core_wait = f" It waited for a CPU core for {percent_text(waited)} of that." if oversubscribed else ""
    own_code = line is not None and not mostly_imports
    if oversubscribed and not own_code:
        advice = _for_cores(startup_s - waited_s, facts.world_size)
    else:
        waits = line is not None and calls_code(lines, "startup", line, COLLECTIVES)
        look = (
            f"Look at {line.place}: cache its result, or do it in the background; in a longer run its share is smaller."
            if line
            else _FOR_STARTUP
        )
        advice = _FOR_IMPORTS if mostly_imports else _FOR_RANKS if waits else look

    return _startup_finding(
        time,
        startup_s,
        _began_text(time, startup_s) + where + "." + core_wait,
        advice,
        evidence={
            **({"import_share": imports.share} if mostly_imports and not imports.is_rough else {}),
            **({"core_wait_share": waited} if oversubscribed else {}),
            **({} if line is None else line.evidence(1.0)),
        },
        waited_s=waited_s,
    )


def _of_ranks(lines: Sequence[SampledLine], facts: JobFacts) -> str:
    """Return ` on rank 0` for lines of some of the ranks; empty for those of all."""
    ranks, known = ({each.rank for each in some if each.part == "startup"} for some in (lines, facts.lines))
    return f" on {ranks_text(sorted(ranks))}" if ranks < known else ""


def _began_text(time: RunTime, startup_s: float, more: str = "") -> str:
    after = f"{duration_text(startup_s)} after the start{more}"
    if time.share("steps", "evaluation") > 0:
        what = "Training" if time.in_steps > 0 else capitalized(_applied_words(time))
        return f"{what} began {after}: {_part_of_run(time)}"

    return f"No training step was seen up to {after}"  # it may train in a way that is not recognized


def _slow_first_steps(time: RunTime, startup_s: float) -> Finding:
    """Return the finding about a start-up that includes what the first steps do once, as compilations."""
    compiled = min(time.compile_s / startup_s, 1.0)
    if compiled >= _REPORTED_SET_UP:
        summary = (
            f"Start-up with the compilations of the first steps took {duration_text(startup_s)}: {_part_of_run(time)}; "
            f"torch.compile took {duration_text(time.compile_s)} of it."
        )
        evidence = {"compile_s": time.compile_s, "compile_share": compiled}
        return _startup_finding(time, startup_s, summary, _FOR_COMPILING, evidence)

    more = f", and the first steps took {duration_text(time.set_up_s)} longer than the others"
    summary = f"{_began_text(time, startup_s - time.set_up_s, more)}."
    return _startup_finding(time, startup_s, summary, _FOR_SET_UP, {"set_up_s": time.set_up_s})


def _awaiting_startup(time: RunTime, startup_s: float, waiting: SampledShare, line: BlamedLine | None) -> Finding:
    """Return the finding about a start-up that is mostly waiting for child processes, as for environments of games."""
    where = f" in {line.place}" if line else ""
    summary = f"{_began_text(time, startup_s)}, {waiting.text} of it waiting for answers of child processes{where}."
    share = {} if waiting.is_rough else {"child_wait_share": waiting.share}
    evidence = {**share, **({} if line is None else line.evidence(1.0))}
    return _startup_finding(time, startup_s, summary, _FOR_CHILDREN, evidence)


def _part_of_run(time: RunTime) -> str:
    return f"{percent_text(time.share('startup'))} of the run's {duration_text(time.wall_s)}"


def _startup_finding(
    time: RunTime, startup_s: float, summary: str, advice: str, evidence: Mapping[str, Any], waited_s: float = 0.0
) -> Finding:
    return Finding.of(
        Kind.STARTUP,
        severity=Severity.WARNING if startup_s - waited_s >= LONG_STARTUP_S else Severity.INFO,
        summary=summary,
        next=advice,
        evidence={"startup_s": startup_s, "wall_s": time.wall_s, "share": time.share("startup"), **evidence},
        cost_share=time.share("startup"),
    )


def _for_cores(left_s: float, ranks: int) -> str:
    fewer = "start fewer ranks per host, " if ranks > 1 else ""
    at_most = "at most" if ranks > 1 else "about"  # what starts the ranks may have waited, too
    return (
        f"The cores were taken meanwhile: {fewer}end or move other programs on this host (`top` names them), or give "
        f"the run cores of its own. With free cores the start-up takes {at_most} {duration_text(left_s)}."
    )


_FOR_COMPILING = (
    "In a longer run its share is smaller. Keep compiled code from run to run (TORCHINDUCTOR_CACHE_DIR on a disk "
    "that stays: the default is in /tmp), or compile one repeated block of the model instead of all of it."
)
_FOR_SET_UP = (
    "In a longer run its share is smaller. Look for what is done once, at the first call (modules that are imported, "
    "kernels and caches that are built): `traceml report --lines` shows the lines."
)
_FOR_FIRST_DATA = (
    "In a longer run its share is smaller. A loader makes each batch that a script only skips: to resume, skip them "
    "in the sampler (torchdata's StatefulDataLoader, Accelerate's skip_first_batches). Otherwise look at what the data "
    "set and its workers do before the first batch: cache it; workers that are spawned import all modules again."
)
_FOR_CHILDREN = (
    "In a longer run its share is smaller. See what these processes do before they answer. Processes that are "
    "spawned, or come from a fork server, import all modules again on the same cores: start fewer of them, or import "
    "less in them."
)
_FOR_RANKS = (
    "It waits there for the other ranks to join the process group: look at what they do before that (imports, data "
    "that one rank prepares for all), and start all ranks at the same time. In a longer run its share is smaller."
)
_FOR_UNSEEN_STEPS = (
    "If the script trains by these calls (zeroth-order or evolution strategies), mark its steps with "
    "traceml.trace_step()."
)
_FOR_FEATURES = (
    "If the training gets what the model gives there (features, latents), keep that on disk for the next runs."
)
_IF_IT_LEARNS = (
    " If the training learns from what it gives (pseudo-labels, features), it is part of the training: make it cheaper "
    "instead."
)
_FOR_IMPORTS = (
    "In a longer run its share is smaller. Move imports that only some runs need to where they are used (python -X "
    "importtime shows what takes long), and keep the Python environment on a local disk."
)


_FOR_STARTUP = (
    "In a longer run its share is smaller. Cache what is computed at each start (tokenized data, indexes, compiled "
    "code), and move imports that only some runs need to where they are used."
)


def _evaluation(
    time: RunTime, seconds: float, line: BlamedLine | None, alone: tuple[int, ...], facts: JobFacts
) -> Finding:
    share = seconds / time.wall_s
    # Metrics, plots, other samples: the model may have been evaluated on the other ranks, too.
    other_code = None if line is None or calls_code(facts.lines, "outside", line, TORCH) else line
    limits = _limit_words(time.evaluation_parts)
    others = time.others_evaluate_s / seconds if alone else 0.0  # as a share: they evaluate less, or not at all
    has_follow_up = other_code is not None and time.in_steps > 0 and not limits
    what = _applied_words(time) + _ranks_words(time, alone, others, has_follow_up=has_follow_up)
    loading = None if alone else for_evaluation(facts, time, share, line)
    if loading is None:
        saved, advice = _less_evaluation(time, seconds, other_code, alone, others, facts)
        finding = _evaluation_finding(time, seconds, line, what, advice, limits)
        return replace(finding, ranks=alone, speedup_if_fixed=speedup_of_share(saved))

    rarer = time.in_steps > 0 and time.repeated_evaluation(seconds) >= _REPEATED_SHARE
    advice = loading.text + _or_else(other_code, rarer=rarer)
    finding = _evaluation_finding(time, seconds, line, what, advice, limits)
    workers = {"workers_advised": loading.workers} if loading.workers else {}
    return replace(finding, speedup_if_fixed=loading.gain or 1.0, evidence={**finding.evidence, **workers})


def _ranks_words(time: RunTime, alone: tuple[int, ...], others: float, *, has_follow_up: bool) -> str:
    """Return which ranks evaluate and which wait for them, and what the time includes beside the evaluation."""
    who = f" on {ranks_text(alone)}" if alone else ""
    until = "it begins" if time.evaluates_only_first else "the training continues"
    who += f", with what follows until {until}" if has_follow_up else ""
    if not alone:
        return who

    if others < _REPORTED_SHORT:
        return f"{who}, for which the others wait"

    return f"{who}, {factor_text(1 / others)} as long as on the others, which wait"


def _less_evaluation(
    time: RunTime, seconds: float, code: BlamedLine | None, alone: tuple[int, ...], others: float, facts: JobFacts
) -> tuple[float, str]:
    """Return the share of the run that less evaluation saves, or one on all ranks, and the advice.

    Args:
        code: line of the evaluation that is not the model's.
        alone: ranks that evaluate for all.
        others: share of their time that the other ranks evaluate.
    """
    gradients = "" if facts.plain_evaluation or facts.evaluates_gradients else ", without gradients (torch.no_grad())"
    if time.in_steps == 0:
        return 0.0, f"{_for_inference(code, gradients, facts)} {_FOR_UNSEEN_STEPS}"

    evaluated = _evaluated_loader(facts)
    elsewhere = f"with larger ones{gradients}, or in another process."
    share, repeated = seconds / time.wall_s, time.repeated_evaluation(seconds)
    if alone:
        saved = share * (1 - others) * (1 - len(alone) / facts.world_size)
        return saved, _on_all_ranks(time, code, f"that saves {percent_text(saved)} of the run.", gradients, elsewhere)

    if time.evaluates_only_first:
        there = _for_awaited_workers(evaluated, facts) or _for_first_evaluation(code, gradients)
        return 0.0, f"{there} {_FOR_FEATURES}"

    once = repeated < _REPEATED_SHARE
    saved = share / 2 * (1.0 if once else repeated)
    saves = f"that saves {percent_text(saved)} of the run."
    rarer = "evaluate on fewer batches." if once else f"evaluate half as often: {saves}"
    if data := _for_awaited_workers(evaluated, facts, rarer):
        return saved, data

    if code:
        rarer = "run it less often." if once else f"run it half as often, with the evaluation: {saves}"
        return saved, f"Make {code.place} cheaper, or {rarer}"

    less = f"Evaluate on half as many batches: {saves} Or evaluate"
    less = less if once else f"Evaluate half as often: {saves} Or evaluate on fewer batches,"
    return saved, f"{less} {elsewhere}" + _IF_IT_LEARNS * time.evaluates_before


def _evaluated_loader(facts: JobFacts) -> tuple[LoaderFacts | None, Sequence[SampledLine]]:
    """Return the loader of the evaluation, and the lines of its workers; one like the training's is none of the others.

    Workers that each evaluation starts anew may be gone before they are seen.
    """
    others = [each for each in facts.other_loaders if each.num_workers]
    unseen = (others[0], ()) if len(others) == 1 and not facts.worker_lines else None
    return facts.other_loader or unseen or (facts.loader, facts.worker_lines)


def _on_all_ranks(time: RunTime, code: BlamedLine | None, saves: str, gradients: str, elsewhere: str) -> str:
    """Return advice on an evaluation by some ranks for all."""
    if time.evaluates_only_first:
        on_all = f"Call the model on all ranks, each on an equal part of the data: {saves}"
        return f"{on_all} {_for_first_evaluation(code, gradients)} {_FOR_FEATURES}"

    if code:
        return f"Share {code.place} evenly among all ranks: {saves} Or make it cheaper, or run it less often."

    return (
        f"Evaluate on all ranks, each on an equal part of the data: {saves} Or evaluate less often, on fewer batches, "
        f"{elsewhere}"
    )


def _for_first_evaluation(code: BlamedLine | None, gradients: str) -> str:
    return f"Make {code.place} cheaper." if code else f"Use larger batches there{gradients}."


def _limit_words(parts: EvaluationParts) -> str:
    """Return what most of an evaluation is; empty if it is neither waiting for data nor calls of the model."""
    if parts.input_share >= NAMED_SHARE:
        return f", {percent_text(parts.input_share)} of it waiting for data"

    return f", {percent_text(parts.forward_share)} of it calls of the model" * (parts.forward_share >= NAMED_SHARE)


def _or_else(line: BlamedLine | None, *, rarer: bool) -> str:
    """Return what else an evaluation that reads its data by itself could do; `rarer`: whether it could be rarer."""
    others = [f"make {line.place} cheaper"] if line else []
    others += ["evaluate less often"] if rarer else []
    return f" Or {', or '.join(others)}." if others else ""


def _applied_words(time: RunTime) -> str:
    """Return how calls of the model outside steps are called: a script without any only applies it."""
    if time.in_steps == 0:
        return "inference"

    return "inference before the training" if time.evaluates_only_first else "evaluation"


def _for_awaited_workers(
    evaluated: tuple[LoaderFacts | None, Sequence[SampledLine]], facts: JobFacts, rarer: str = ""
) -> str:
    """Return the advice where most of an evaluation waits for loader workers; else empty.

    Args:
        evaluated: the loader of the evaluation and the lines of its workers.
        rarer: advice to evaluate less; empty if that is the script's work.
    """
    if worker_wait_share(facts.lines, LINE_PHASES[LINE_OUTSIDE]) < NAMED_SHARE:
        return ""

    loader, lines = evaluated
    made = workers_line(lines, waits_are_rare=True)
    if loader is None or not loader.num_workers:
        return ""

    cheaper = f"make {made.place if made else 'its samples'} cheaper"
    keep = f"keep them from one evaluation to the next ({loader.option('persistent_workers')}=True), "
    kept = keep if rarer and loader.can_keep_workers else ""
    whom = "worker" if loader.num_workers == 1 else f"{loader.num_workers} workers"
    if kept and not lines:
        return f"It waits for the {whom} of its DataLoader, which start for each evaluation: {kept}use none, or {rarer}"

    return (
        f"It waits for the {whom} of its DataLoader: set a larger {loader.option('num_workers')} there if there are "
        f"cores for them, {kept}" + (f"{cheaper}, or {rarer}" if rarer else f"or {cheaper}.")
    )


def _for_inference(line: BlamedLine | None, gradients: str, facts: JobFacts) -> str:
    """Return advice to a script that only applies a model: less of it would be less work done."""
    if line is None:
        return f"Apply the model to larger batches{gradients}{', or in a lower precision' * facts.may_lower_precision}."

    if data := _for_awaited_workers((facts.loader, facts.worker_lines), facts):
        return data

    loader = facts.loader or LoaderFacts()
    is_of_samples = bool(loader.dataset) and line.function.startswith(f"{loader.dataset}.")
    if loader.num_workers != 0 or not is_of_samples:
        return f"Make {line.place} cheaper."

    workers = f"workers of the DataLoader do it while the model computes ({loader.option('num_workers')})"
    return f"Make {line.place} cheaper, or let {workers}."


def _play(time: RunTime, line: BlamedLine | None) -> Finding:
    """Return the finding on calls with one sample each: self-play, or evaluation; half as often would be other data."""
    seconds = time.seconds["evaluation"]
    advice = (
        "The model is called with one sample each time there: call it with several at once, as with the states of "
        "several games or with several prompts. If it only evaluates, half as often saves "
        f"{percent_text(seconds / time.wall_s / 2)} of the run."
    )
    finding = _evaluation_finding(time, seconds, line, "evaluation or self-play", advice)
    return replace(finding, evidence={**finding.evidence, "samples_per_call": 1})


def _evaluation_finding(
    time: RunTime, seconds: float, line: BlamedLine | None, what: str, advice: str, limits: str = ""
) -> Finding:
    share, parts = seconds / time.wall_s, time.evaluation_parts
    times, short = max(time.evaluations - time.short_evaluations, 1), max(time.short_evaluations, 1)
    others_s = min(time.short_evaluations_s + time.evaluating_s, seconds)
    is_running = time.evaluating_s >= _REPORTED_SHORT * seconds
    running = f", and one has run for {duration_text(time.evaluating_s)} so far" if is_running else ""
    others = f", and {_often(short)} {duration_text(time.short_evaluations_s / short)}"
    others *= time.short_evaluations_s >= _REPORTED_SHORT * seconds
    return Finding.of(
        Kind.EVAL_HEAVY,
        summary=(
            f"{percent_text(share)} of the run's {duration_text(time.wall_s)} is {what}: {_often(times)} "
            f"{duration_text((seconds - others_s) / times)}{others}{limits}"
            + (f", mostly at {line.place}" if line else "")
            + f"{running}."
        ),
        next=advice,
        evidence={
            "evaluation_s": seconds,
            "evaluations": times,
            "wall_s": time.wall_s,
            "share": share,
            **({} if time.in_steps > 0 else {"steps": 0}),
            **({"before_training": True} if time.evaluates_only_first and time.in_steps > 0 else {}),
            **({"input_share": parts.input_share, "forward_share": parts.forward_share} if parts.batches else {}),
            **({} if line is None else line.evidence(share)),
        },
        cost_share=share,
    )


def _often(times: int) -> str:
    return "once" if times == 1 else f"{count_text(times)} times"


def uncovered_time_text(facts: JobFacts) -> str:
    """Return the sentence on what a verdict about steps does not cover; empty if steps are nearly all of the run."""
    time = facts.time
    if time is None or time.is_steps:
        return ""

    return f" The rest of the run's {duration_text(time.wall_s)}: {_largest(time, facts.lines)}."


def _largest(time: RunTime, lines: Sequence[SampledLine]) -> str:
    others: Sequence[str] = sorted(
        (part for part in time.seconds if part not in ("steps", "checkpoint", "between_epochs")),
        key=lambda part: -time.seconds[part],
    )
    after = outside_line(lines, LINE_AFTER_STEPS)
    where = {"idle": f" ({after.share_text} of it in {after.place})"} if after else {}
    shown = [part for part in others[:2] if time.share(part) >= 0.05]
    return ", ".join(f"{part_words(part)} {percent_text(time.share(part))}{where.get(part, '')}" for part in shown)
