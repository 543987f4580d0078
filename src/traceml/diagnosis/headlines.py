"""Headlines of findings: one sentence without a period, of the numbers behind each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from traceml.formatting import (
    bytes_text,
    capitalized,
    count_text,
    duration_text,
    factor_text,
    largest_text,
    left_text,
    line_text,
    ms_text,
    ordinal_text,
    percent_text,
    phase_words,
    phases_text,
    plural,
    ranks_text,
)
from traceml.process_ends import exit_text, signal_name

__all__ = [
    "FindingFacts", "communication", "compute", "core_wait", "device_fault", "devices_text", "duplicates", "evaluation",
    "hang", "healthy", "input_wait", "insufficient_data", "leak", "lost_ranks", "lost_worker", "near_limit",
    "not_finite", "pauses_text", "pressure", "recompiles", "share_text", "skipped", "slow_ranks", "slowdown", "startup",
    "stopped", "uneven_memory", "unknown", "user_code",
]  # fmt: skip

_WAITS_FOR = {
    "messages": "The ranks wait for messages of each other",
    "answers": "Training waits for functions in other processes (RPC)",
}
"""What ranks wait for in place of a transfer; the time is that of what others compute."""
_MEMORIES = {"device": "Device memory", "pinned": "Pinned memory"}
# A line with this share of a finding's cost stands in its headline.
_MOST = 0.6
_HALF = 0.5
_MOSTLY = 0.8
"""A line with a smaller share of the phase in which every n-th step is long has most of that, and not all."""


class FindingFacts(NamedTuple):
    """The part of a finding that headlines need; see `Finding`."""

    kind: str
    ranks: tuple[int, ...]
    phase: str | None
    cost_share: float
    evidence: Mapping[str, Any]
    is_critical: bool  # whether it has the highest severity
    is_costly: bool  # whether it costs as much as a timing finding must


_BY_SCHEDULER = {
    "time_limit": "time limit",
    "preempted": "preemption",
    "warned": "warning",
    "requeued": "queued again",
    "cancelled": "scancel or a lost node",
}


def lost_ranks(finding: FindingFacts) -> str:
    """Return `Rank 1 ended by SIGKILL at step 37, in forward`."""
    evidence = finding.evidence
    if by_scheduler := _BY_SCHEDULER.get(evidence.get("cause", "")):
        return f"Ended by the scheduler: {by_scheduler}"

    if evidence.get("cause") == "ended_from_outside":
        if evidence.get("launcher_pid") is not None:
            return f"The job ended with its killed launcher{_when_ended(evidence)}"

        how = signal_name(int(evidence["signal"]))
        return f"The job was ended from outside by {how}{_when_ended(evidence)}"

    if evidence.get("cause") == "left_early":
        return f"{capitalized(ranks_text(finding.ranks))} ended before the others"

    how = ""
    if evidence.get("worker_pid") is not None and len(finding.ranks) > 1:
        how = " because loader workers died"
    elif evidence.get("worker_pid") is not None:
        its = "its loader worker" if evidence.get("workers") == 1 else "one of its loader workers"
        how = f" because {its} {_worker_end(evidence)}"
    elif evidence.get("cause") == "out_of_memory":
        how = " for lack of device memory" if evidence.get("limit_of") == "device" else " for lack of memory"
    elif (number := evidence.get("signal")) is not None:
        how = f" by {signal_name(int(number))}"
    elif exception := evidence.get("exception"):
        how = f" by {str(exception).splitlines()[0].split(':')[0]}"
    elif (code := evidence.get("code")) is not None:
        how = f" with exit code {code}"

    did, its = f"ended{how}", "its" if len(finding.ranks) == 1 else "their"
    if (lost := evidence.get("lost")) is not None:
        did = f"lost {its} connection" if lost == "connection" else f"{_be(finding.ranks)} lost with {its} host"

    where = "" if finding.phase is None else f", in {phase_words(finding.phase)}"
    return f"{capitalized(ranks_text(finding.ranks))} {did}{_when_ended(evidence)}{where}"


def _be(ranks: tuple[int, ...]) -> str:
    return "was" if len(ranks) == 1 else "were"


def _when_ended(evidence: Mapping[str, Any]) -> str:
    """Return ` at step 37`, ` after step 37` where it had ended, ` at step 37 of this run` where a script continued."""
    last = evidence.get("last_step")
    step = evidence.get("step", last)
    if step is None:
        return ""

    own = " of this run" if evidence.get("counts_anew") else ""
    own += "" if evidence.get("first_rank") is None else f" on rank {evidence['first_rank']}"
    return f" {'after' if step == last else 'at'} step {count_text(int(step))}{own}"


def _worker_end(evidence: Mapping[str, Any]) -> str:
    if (number := evidence.get("worker_signal")) is not None:
        return f"was killed by {signal_name(int(number))}"

    return exit_text(evidence.get("worker_code"))


def lost_worker(finding: FindingFacts) -> str:
    """Return `A loader worker of rank 0 was killed by SIGKILL at step 37`."""
    evidence = finding.evidence
    several = int(evidence.get("lost", 1)) > 1
    subject = f"{count_text(int(evidence['lost']))} loader workers" if several else "A loader worker"
    step = evidence.get("step")
    when = (
        "" if step is None else f" {'from' if several else 'at'} step {count_text(int(step))}{' on' if several else ''}"
    )
    how = "died" if several else _worker_end(evidence)
    return f"{subject} of {ranks_text(finding.ranks)} {how}{when}"


_HANGS = {
    "mismatch": "{ranks_are} in a different collective from the others",
    "sizes": "{ranks_are} calling the collective with different tensor sizes",
    "roots": "{ranks_are} calling the collective with a different root",
    "cycle": "{ranks} wait for each other",
    "network": "All ranks hang in {operation}",
    "rendezvous": "The ranks do not find each other in {operation}",
    "ended": "{ranks} ended, and the others wait",
    "data_ended": "The data of {of_ranks} ended, and the others wait",
    "unanswered": "The job hangs: {ranks} did not answer",
}
_OF_ALL = ("network", "rendezvous")
_ALL_DIFFER = {
    "mismatch": "{ranks} are in different collectives",
    "sizes": "{ranks} call the same collective with different tensor sizes",
    "roots": "{ranks} call the same collective with different roots",
}


def hang(finding: FindingFacts) -> str:
    """Return `Rank 1 blocks the others, in train.py:6 stuck`, or that the job hung when it was ended."""
    evidence = finding.evidence
    cause, waiting = str(evidence.get("cause", "")), evidence.get("waiting")
    ranks = capitalized(ranks_text(finding.ranks))
    file, first = evidence.get("file"), evidence.get("first_rank")
    where = f"in {_place(evidence)}" if file else ""
    if not file and finding.phase:
        where = str(evidence.get("state") or f"in {phase_words(finding.phase)}")

    at = where and (f", {where}" if first is None else f", rank {first} {where}")

    if cause in _HANGS and (finding.ranks or cause in _OF_ALL):
        are = f"{ranks} {'is' if len(finding.ranks) == 1 else 'are'}"
        template = _HANGS[cause] if waiting else _ALL_DIFFER.get(cause, _HANGS[cause])
        text = template.format(
            ranks=ranks,
            of_ranks=ranks_text(finding.ranks),
            ranks_are=are,
            operation=evidence.get("operation") or "a collective",
        )
        return text if cause == "ended" else text + (at if cause in _OF_ALL else "")

    if not finding.ranks:
        return f"No rank makes progress{at}"

    many = len(finding.ranks) > 1
    if waiting:
        return f"{ranks} {'block' if many else 'blocks'} the others{at}"

    return f"{ranks} {'make' if many else 'makes'} no progress{at}"


def user_code(finding: FindingFacts) -> str:
    """Return `94 % of step time is spent in train.py:23 update_metric`, or `Every 25th step ...`."""
    evidence = finding.evidence
    phase = "other" if finding.phase is None else finding.phase  # a user's phase may have no name: ""
    share, where = finding.cost_share, phase_words(phase)
    line_share = evidence.get("line_share")
    line = _place(evidence) if "function" in evidence else None
    if every := evidence.get("every_n_steps"):
        where = phases_text(evidence.get("phases", [phase]), line)
        mostly = "mostly " if line and line_share is not None and line_share < _MOSTLY * share else ""
        return f"Every {ordinal_text(int(every))} step is long, {mostly}in {where}: {share_text(finding)}"

    if "trainings" in evidence:
        return f"Set-up between {evidence['trainings']} trainings, in {line or where}: {share_text(finding)}"

    if line and line_share is None:  # few samples
        return f"{_spent_in(percent_text(share), where)}, mostly in {line}"

    if line and line_share and line_share >= _MOST * share:
        share, where = min(line_share, share), line  # of the phase, rare long steps are not in the cost

    return _spent_in(percent_text(share), where)


def _spent_in(share: str, where: str) -> str:
    return f"{share} of step time is spent in {where}"


def healthy(finding: FindingFacts) -> str:
    """Return `No bottleneck found`, `Steps are fine; they take 45 % of the run's time`, or another remark.

    If code of the script could be made cheaper, that is its line.
    """
    if "pause_share" in finding.evidence:
        return f"{_of_pauses(finding.evidence)}; the others are fine"

    if finding.evidence.get("too_short"):
        return f"Steps of {ms_text(finding.evidence['step_ms'])} are too short to judge"

    if finding.evidence.get("own_code"):
        return _of_own_code(finding.evidence)

    share = finding.evidence.get("steps_share")
    return (
        "No bottleneck found" if share is None else f"Steps are fine; they take {percent_text(share)} of the run's time"
    )


def compute(finding: FindingFacts) -> str:
    """Return `The model's own compute limits this run, most of it in backward`, or the line that could be cheaper.

    Steps that take much of the time of all come first: compute limits the others.
    """
    if "pause_share" in finding.evidence:
        return f"{_of_pauses(finding.evidence)}; compute limits the others"

    if finding.evidence.get("own_code"):
        return _of_own_code(finding.evidence)

    evidence, share = finding.evidence, finding.evidence.get("steps_share")
    busy = evidence.get("device_busy_share")
    if busy is not None:
        of_run = "" if share is None else f"; steps take {percent_text(share)} of the run's time"
        return f"Launching work limits the steps: the device computes {percent_text(busy)} of the time{of_run}"

    heaviest = evidence.get("share_by_phase", {}).get(finding.phase)
    part = f"{largest_text(heaviest, evidence.get('compute_share'))} in {phase_words(finding.phase or 'the step')}"
    if share is None:
        return f"The model's own compute limits this run, {part}"

    return f"Compute limits the steps, {part}; they take {percent_text(share)} of the run's time"


def pauses_text(evidence: Mapping[str, Any]) -> str:
    """Return `one step of 16.0 s`, or `1.0 s between trainings`."""
    count, each = int(evidence["pauses"]), ms_text(evidence["pause_ms"])
    if "between_trainings" in evidence:
        return f"{each} between trainings"

    return f"one step of {each}" if count == 1 else f"{count} steps of {each} each"


def _of_pauses(evidence: Mapping[str, Any]) -> str:
    """Return `One step takes 52 % of all step time`."""
    count = int(evidence["pauses"])
    steps = "One step takes" if count == 1 else f"{count} steps take"
    what = "Set-up between trainings takes" if "between_trainings" in evidence else steps
    return f"{what} {percent_text(evidence['pause_share'])} of all step time"


def _of_own_code(evidence: Mapping[str, Any]) -> str:
    """Return `74 % of step time is spent in train.py:19 log_gradient`."""
    share = evidence.get("line_share")  # None if few samples saw it
    return _spent_in(percent_text(share) if share else "Much", _place(evidence))


def input_wait(finding: FindingFacts) -> str:
    """Return `Training waits for data: 62 % of step time`, or that for its loader's workers to start."""
    when = "for each step" if finding.evidence.get("each_step") else "in each epoch"
    what = f"new loader workers {when}" if finding.evidence.get("restart_ms") else "data"
    return f"Training waits for {what}: {share_text(finding)}"


def core_wait(finding: FindingFacts) -> str:
    """Return `Rank 1 waits for a CPU core: 62 % of step time`, or that the training does."""
    who = f"{ranks_text(finding.ranks)} {'wait' if len(finding.ranks) > 1 else 'waits'}"
    return f"{capitalized(who) if finding.ranks else 'The training waits'} for a CPU core: {share_text(finding)}"


def share_text(finding: FindingFacts, whole: str = "step time") -> str:
    """Return `34 % of step time`, or `part of step time`."""
    return f"{percent_text(finding.cost_share)} of {whole}" if finding.cost_share else f"part of {whole}"


def long_steps(finding: FindingFacts) -> str:
    """Return `Some steps take far longer than the rest: 30 % of step time`, or the same of one step."""
    steps = "One step takes" if finding.evidence.get("long_steps") == 1 else "Some steps take"
    return f"{steps} far longer than the rest: {share_text(finding)}"


def slowdown(finding: FindingFacts) -> str:
    """Return `Steps take 2.1x as long since step 200`."""
    evidence = finding.evidence
    if not evidence.get("factor"):
        return "Steps become slower"

    factor = factor_text(float(evidence["factor"]))
    since, until = (count_text(evidence.get(name)) for name in ("since_step", "until_step"))
    shape = evidence.get("shape")
    if shape == "growth":
        end = f"by step {until}" if "until_step" in evidence else "at the end"
        return f"Steps become slower: {end} they take {factor} as long"

    when = f"until step {until}" if shape == "first" else f"since step {since}"
    return f"Steps take {factor} as long {when}" + (f", until step {until}" if shape == "recovers" else "")


def near_limit(finding: FindingFacts) -> str:
    """Return `Open files: 92 % of the limit in use`."""
    evidence = finding.evidence
    resource = str(evidence.get("resource", "resource")).replace("_", " ").replace("cpu ", "CPU ")
    share = percent_text(evidence.get("used", 0) / max(evidence.get("limit", 1), 1))
    if resource == "CPU quota":
        return f"The CPU quota throttles this run {share} of the time"

    return f"{capitalized(resource)}: {share} of the limit in use"


def leak(finding: FindingFacts) -> str:
    """Return `Memory of rank 1 grows by 4.00 MiB per step: full in 12 min`."""
    evidence = finding.evidence
    memory, left_s = evidence.get("memory", "resident"), evidence.get("left_s")
    whose = f" of {ranks_text(finding.ranks)}" if finding.ranks else ""
    if workers := int(evidence.get("workers", 0)):
        rate = f"{bytes_text(int(60 * float(evidence['bytes_per_s'])))} per minute"
        one = f"The loader worker{whose} grows by {rate}"
        return one if workers == 1 else f"{workers} loader workers{whose} grow by {rate} together"

    full = "" if left_s is None or not finding.is_critical else f": full in {left_text(float(left_s))}"
    subject = _MEMORIES.get(str(memory), "Memory")
    return f"{subject}{whose} grows by {bytes_text(int(evidence.get('bytes_per_step', 0)))} per step{full}"


def pressure(finding: FindingFacts) -> str:
    """Return `The host's memory is nearly full: 95 % in use`, or that of a device, which others may fill."""
    evidence = finding.evidence
    share = percent_text(float(evidence.get("used_share", 1.0)))
    if retries := evidence.get("alloc_retries"):
        return (
            f"Device memory is short: torch freed its cache for {plural(retries, 'allocation')}, tensors took {share}"
        )

    if evidence.get("memory") == "device":
        return f"The device's memory is nearly full: up to {share} in use"

    return f"The host's memory is nearly full: {share} in use"


def duplicates(finding: FindingFacts) -> str:
    """Return `Ranks 0-3 train on identical batches`, or that each worker, or each epoch, has the same ones."""
    if workers := finding.evidence.get("workers"):
        return f"Each of the {workers} loader workers reads the same data"

    if finding.evidence.get("same_order"):
        return "Each epoch has the same order: set_epoch is not called"

    whose = capitalized(ranks_text(finding.ranks)) if finding.ranks else "All ranks"
    return f"{whose} train on identical batches"


def not_finite(finding: FindingFacts) -> str:
    """Return `The loss has not been finite since step 120: first nan on rank 1`.

    Or, of trainings before the last: `Losses were not finite in 12 % of the steps, first in step 120: nan`.
    """
    evidence = finding.evidence
    since = count_text(evidence.get("since_step"))
    if "until_step" in evidence:
        share = percent_text(finding.cost_share)
        return f"Losses were not finite in {share} of the steps, first in step {since}: {evidence.get('loss', 'nan')}"

    where = f" on {ranks_text(finding.ranks)}" if finding.ranks else ""
    return f"The loss has not been finite since step {since}: first {evidence.get('loss', 'nan')}{where}"


def skipped(finding: FindingFacts) -> str:
    """Return `67 % of the steps are skipped because gradients are not finite`."""
    share = f"{percent_text(finding.cost_share)} of the steps" if finding.cost_share else "Steps"
    return f"{share} are skipped because gradients are not finite"


def recompiles(finding: FindingFacts) -> str:
    """Return `The same function is compiled again and again: ...`, or that it no longer is."""
    if finding.evidence.get("limit_reached") and not finding.is_costly:
        return "A function is no longer compiled: its inputs differ too often"

    return f"The same function is compiled again and again: {percent_text(finding.cost_share)} of the run's time"


def device_fault(finding: FindingFacts) -> str:
    """Return `GPU 3 reports a fault`, or that several do."""
    is_one = len(finding.evidence.get("devices") or []) == 1
    return f"{devices_text(finding.evidence)} {'reports a fault' if is_one else 'report faults'}"


def startup(finding: FindingFacts) -> str:
    """Return `45 % of the run's time is start-up, before the first step`, or that most of it is compiling."""
    share = _run_share(finding)
    if finding.evidence.get("compile_share", 0) >= _HALF:
        return f"{share} is start-up, most of it torch.compile"
    if "first_data_s" in finding.evidence:
        return f"{share} is start-up, most of it waiting for data before the first step"

    of_first_steps = {"compile_s", "set_up_s"} & finding.evidence.keys()
    return f"{share} is start-up, {'up to the end of the first steps' if of_first_steps else 'before the first step'}"


def evaluation(finding: FindingFacts) -> str:
    """Return `60 % of the run's time is evaluation`, with self-play, the ranks that evaluate for all, and the line."""
    evidence = finding.evidence
    first = evidence.get("before_training", False)
    what = "inference before the training" if first else "inference" if evidence.get("steps") == 0 else "evaluation"
    or_play = " or self-play" if "samples_per_call" in evidence else ""
    on_ranks = f" on {ranks_text(finding.ranks)}" if finding.ranks else ""
    return f"{_run_share(finding)} is {what}{or_play}{on_ranks}{_mostly_at(finding)}"


def after_steps(finding: FindingFacts) -> str:
    """Return `60 % of the run's time is after the last step, mostly at train.py:80 plot`."""
    return f"{_run_share(finding)} is after the last step{_mostly_at(finding)}"


def _place(evidence: Mapping[str, Any]) -> str:
    return line_text(evidence["file"], evidence["line"], evidence["function"], evidence.get("lines"))


def _mostly_at(finding: FindingFacts) -> str:
    return f", mostly at {_place(finding.evidence)}" if "function" in finding.evidence else ""


def _run_share(finding: FindingFacts) -> str:
    return capitalized(share_text(finding, "the run's time"))


def communication(finding: FindingFacts) -> str:
    """Return `Communication between ranks slows training down: 34 % of step time`, or that some ranks are not seen."""
    waiting = "Communication between ranks slows training down"
    if every := finding.evidence.get("every_n_steps"):
        waiting = f"Every {ordinal_text(int(every))} step is long, in communication between ranks"
    elif "unseen_ranks" in finding.evidence:
        waiting = "The ranks of this run wait for others"
    elif "ranks_without_steps" in finding.evidence:
        waiting = "The ranks that train wait for others"
    else:
        waiting = _WAITS_FOR.get(str(finding.evidence.get("waits_for")), waiting)

    return f"{waiting}: {share_text(finding)}"


def slow_ranks(finding: FindingFacts) -> str:
    """Return `Rank 1 is slow in forward: the others wait, 34 % of step time`, or for whom nobody waits yet."""
    evidence, many = finding.evidence, len(finding.ranks) != 1
    group = evidence.get("rank_group") or {}
    ranks = capitalized(group.get("words") or ranks_text(finding.ranks))
    phase = "the step" if finding.phase is None else phase_words(finding.phase)
    if every := evidence.get("every_n_steps"):
        phase = f"every {ordinal_text(int(every))} step, in {phase}"

    if "imbalance_ms" in evidence:
        return f"{ranks} take turns being slow in {phase}: {share_text(finding)}"

    slow = f"{ranks} {'are' if many else 'is'} slow in {phase}"
    if evidence.get("is_hidden"):
        return f"{slow}, hidden by other slow ranks: {share_text(finding)}"

    others = "the others of the group" if evidence.get("faster_ranks") else "the others"
    return f"{slow}: {others} wait, {share_text(finding)}"


def uneven_memory(finding: FindingFacts) -> str:
    """Return `Rank 1 uses far more memory than the others`."""
    use = "uses" if len(finding.ranks) == 1 else "use"
    return f"{capitalized(ranks_text(finding.ranks))} {use} far more memory than the others"


def devices_text(evidence: Mapping[str, Any]) -> str:
    """Return `GPU 3`, or `2 GPUs`."""
    devices = evidence.get("devices") or []
    return f"GPU {devices[0]}" if len(devices) == 1 else f"{len(devices)} GPUs"


def stopped(finding: FindingFacts) -> str:
    """Return `Rank 1 was stopped for 30 s`, or that its machine was suspended."""
    seconds, ranks = finding.evidence.get("stopped_s"), ranks_text(finding.ranks)
    how_long = "a while" if seconds is None else duration_text(float(seconds))
    if finding.evidence.get("suspended"):
        return f"The machine of {ranks} was suspended for {how_long}"

    return f"{capitalized(ranks)} {_be(finding.ranks)} stopped for {how_long}"


def insufficient_data(finding: FindingFacts) -> str:
    """Return `Not enough data for a verdict`, or the line of a run without steps."""
    if "function" not in finding.evidence:
        return "Not enough data for a verdict"

    return f"No training step was seen; most of the time is in {_place(finding.evidence)}"


def unknown(finding: FindingFacts) -> str:
    """Return the name of a kind of a newer version, with ranks and phase."""
    words = capitalized(finding.kind.lower().replace("_", " "))
    where = f", in {phase_words(finding.phase)}" if finding.phase else ""
    return f"{words} on {ranks_text(finding.ranks)}{where} (unknown to this version of traceml)"
