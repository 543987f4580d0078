"""Kinds of finding: each is declared here, once, with its headline and its severity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from traceml.formatting import (
    bytes_text,
    capitalized,
    count_text,
    duration_text,
    factor_text,
    left_text,
    line_text,
    ms_text,
    ordinal_text,
    percent_text,
    phase_words,
    ranks_text,
)
from traceml.process_ends import exit_text, signal_name

__all__ = ["CRITICAL_SHARE", "FLOOR_NS", "WARNING_SHARE", "Kind", "KindRule", "Severity", "least_cost_ns"]

WARNING_SHARE = 0.10
"""A timing finding costs at least this share of step time."""
CRITICAL_SHARE = 0.25
"""From this share on a timing finding is critical."""
FLOOR_NS = 1e6
"""Costs below a millisecond per step are not reported: a toy's loader, loss function and Python cost that much."""

_MEMORIES = {"device": "Device memory", "pinned": "Pinned memory"}
# A line with this share of a finding's cost stands in its headline.
_MOST = 0.6
_HALF = 0.5


def least_cost_ns(step_ns: float, share: float = WARNING_SHARE) -> float:
    """Return the cost per step from which on a timing finding is reported.

    Args:
        step_ns: mean step.
        share: of it that a finding costs at least.
    """
    return max(FLOOR_NS, share * step_ns)


class Severity(StrEnum):
    """Weight of a finding, which also gives its color: green, yellow, red."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"


class _FindingFacts(Protocol):
    """The part of a finding that headlines need."""

    @property
    def kind(self) -> Kind: ...
    @property
    def severity(self) -> Severity: ...
    @property
    def ranks(self) -> tuple[int, ...]: ...
    @property
    def phase(self) -> str | None: ...
    @property
    def cost_share(self) -> float: ...
    @property
    def evidence(self) -> Mapping[str, Any]: ...


_BY_SCHEDULER = {"time_limit": "time limit", "preempted": "preemption", "warned": "warning", "requeued": "queued again"}


def _lost_ranks(finding: _FindingFacts) -> str:
    """Return `Rank 1 ended by SIGKILL at step 37, in forward`."""
    evidence = finding.evidence
    if by_scheduler := _BY_SCHEDULER.get(evidence.get("cause", "")):
        return f"Ended by the scheduler: {by_scheduler}"

    if evidence.get("cause") == "ended_from_outside":
        step = evidence.get("step")
        when = "" if step is None else f" at step {count_text(int(step))}"
        return f"The job was ended from outside by {signal_name(int(evidence['signal']))}{when}"

    if evidence.get("cause") == "left_early":
        return f"{capitalized(ranks_text(finding.ranks))} ended before the others"

    how = ""
    if evidence.get("worker_pid") is not None:
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

    step = evidence.get("step", evidence.get("last_step"))
    when = "" if step is None else f" at step {count_text(int(step))}"
    where = "" if finding.phase is None else f", in {phase_words(finding.phase)}"
    return f"{capitalized(ranks_text(finding.ranks))} ended{how}{when}{where}"


def _worker_end(evidence: Mapping[str, Any]) -> str:
    if (number := evidence.get("worker_signal")) is not None:
        return f"was killed by {signal_name(int(number))}"

    code = evidence.get("worker_code")
    return exit_text(code)


def _lost_worker(finding: _FindingFacts) -> str:
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
    "circle": "{ranks} wait for each other",
    "network": "All ranks hang in {operation}",
    "ended": "{ranks} ended, and the others wait",
    "data_ended": "The data of {of_ranks} ended, and the others wait",
    "unanswered": "The job hangs: {ranks} did not answer",
}
_ALL_DIFFER = {
    "mismatch": "{ranks} are in different collectives",
    "sizes": "{ranks} call the same collective with different tensor sizes",
}


def _hang(finding: _FindingFacts) -> str:
    """Return `Rank 1 blocks the others, in train.py:6 stuck`, or that the job hung when it was ended."""
    evidence = finding.evidence
    cause, waiting = str(evidence.get("cause", "")), evidence.get("waiting")
    ranks = capitalized(ranks_text(finding.ranks))
    file = evidence.get("file")
    at = f", in {line_text(file, evidence['line'], evidence['function'])}" if file else ""
    if not file and finding.phase:
        at = f", {evidence['state']}" if evidence.get("state") else f", in {phase_words(finding.phase)}"

    if cause in _HANGS and (finding.ranks or cause == "network"):
        are = f"{ranks} {'is' if len(finding.ranks) == 1 else 'are'}"
        template = _HANGS[cause] if waiting else _ALL_DIFFER.get(cause, _HANGS[cause])
        text = template.format(
            ranks=ranks,
            of_ranks=ranks_text(finding.ranks),
            ranks_are=are,
            operation=evidence.get("operation") or "a collective",
        )
        return text if cause == "ended" else text + (at if cause == "network" else "")

    many = len(finding.ranks) != 1
    if waiting:
        return f"{ranks} {'block' if many else 'blocks'} the others{at}"

    return f"{ranks} {'make' if many else 'makes'} no progress{at}"


def _user_code(finding: _FindingFacts) -> str:
    """Return `94 % of step time is spent in train.py:23 update_metric`, or `Every 25th step ...`."""
    evidence = finding.evidence
    share, where = finding.cost_share, phase_words(finding.phase or "other")
    line_share = evidence.get("line_share")
    line = line_text(evidence["file"], evidence["line"], evidence["function"]) if "function" in evidence else None
    if every := evidence.get("every_n_steps"):
        return f"Every {ordinal_text(int(every))} step is long, in {line or where}: {_of_step_time(finding)}"

    if line and line_share is None:  # few samples
        return f"{percent_text(share)} of step time is spent in {where}, mostly in {line}"

    if line and line_share and line_share >= _MOST * share:
        share, where = min(line_share, share), line  # of the phase, rare long steps are not in the cost

    return f"{percent_text(share)} of step time is spent in {where}"


def _healthy(finding: _FindingFacts) -> str:
    """Return `No bottleneck found`, `Steps are fine; they are 45 % of the run's time`, or that they are too short."""
    if finding.evidence.get("too_short"):
        return f"Steps of {ms_text(finding.evidence['step_ms'])} are too short to judge"

    share = finding.evidence.get("steps_share")
    return (
        "No bottleneck found" if share is None else f"Steps are fine; they are {percent_text(share)} of the run's time"
    )


def _compute(finding: _FindingFacts) -> str:
    share = finding.evidence.get("steps_share")
    phase = phase_words(finding.phase) if finding.phase else "the step"
    if share is None:
        return f"The model's own compute limits this run, most of it in {phase}"

    return f"Compute limits the steps, most of it in {phase}; they are {percent_text(share)} of the run's time"


def _input(finding: _FindingFacts) -> str:
    """Return `Training waits for data: 62 % of step time`, or that for its loader's workers to start."""
    what = "new loader workers in each epoch" if finding.evidence.get("restart_ms") else "data"
    return f"Training waits for {what}: {_of_step_time(finding)}"


def _of_step_time(finding: _FindingFacts) -> str:
    return f"{percent_text(finding.cost_share)} of step time" if finding.cost_share else "part of step time"


def _slowdown(finding: _FindingFacts) -> str:
    """Return `Steps take 2.1x as long since step 200`."""
    evidence = finding.evidence
    if not evidence.get("factor"):
        return "Steps become slower"

    factor = factor_text(float(evidence["factor"]))
    since, until = (count_text(evidence.get(name)) for name in ("since_step", "until_step"))
    shape = evidence.get("shape")
    if shape == "growth":
        return f"Steps become slower: at the end they take {factor} as long"

    when = f"until step {until}" if shape == "first" else f"since step {since}"
    return f"Steps take {factor} as long {when}" + (f", until step {until}" if shape == "recovers" else "")


def _limit(finding: _FindingFacts) -> str:
    """Return `Open files: 92 % of the limit in use`."""
    evidence = finding.evidence
    resource = str(evidence.get("resource", "resource")).replace("_", " ")
    share = percent_text(evidence.get("used", 0) / max(evidence.get("limit", 1), 1))
    if resource == "cpu quota":
        return f"The CPU quota throttles this run {share} of the time"

    return f"{capitalized(resource)}: {share} of the limit in use"


def _leak(finding: _FindingFacts) -> str:
    """Return `Memory of rank 1 grows by 4.00 MiB per step: full in 12 min`."""
    evidence = finding.evidence
    memory, left_s = evidence.get("memory", "resident"), evidence.get("left_s")
    whose = f" of {ranks_text(finding.ranks)}" if finding.ranks else ""
    if workers := int(evidence.get("workers", 0)):
        each = bytes_text(int(60 * float(evidence["bytes_per_s"]) / workers))
        which = f"Each of {workers} loader workers" if workers > 1 else "The loader worker"
        return f"{which}{whose} grows by {each} per minute"

    full = (
        "" if left_s is None or finding.severity is not Severity.CRITICAL else f": full in {left_text(float(left_s))}"
    )
    subject = _MEMORIES.get(str(memory), "Memory")
    return f"{subject}{whose} grows by {bytes_text(int(evidence.get('bytes_per_step', 0)))} per step{full}"


def _pressure(finding: _FindingFacts) -> str:
    """Return `The host's memory is nearly full: 95 % in use`, or that of a device."""
    evidence = finding.evidence
    share = percent_text(float(evidence.get("used_share", 1.0)))
    if evidence.get("memory") == "device":
        return f"The device's memory is nearly full: up to {share} in use"

    return f"The host's memory is nearly full: {share} in use"


def _duplicates(finding: _FindingFacts) -> str:
    """Return `Ranks 0-3 train on identical batches`."""
    whose = capitalized(ranks_text(finding.ranks)) if finding.ranks else "All ranks"
    return f"{whose} train on identical batches"


def _not_finite(finding: _FindingFacts) -> str:
    """Return `The loss has not been finite since step 120: first nan on rank 1`."""
    evidence = finding.evidence
    since = count_text(evidence.get("since_step"))
    where = f" on {ranks_text(finding.ranks)}" if finding.ranks else ""
    return f"The loss has not been finite since step {since}: first {evidence.get('loss', 'nan')}{where}"


def _skipped(finding: _FindingFacts) -> str:
    """Return `67 % of the steps are skipped because gradients are not finite`."""
    share = f"{percent_text(finding.cost_share)} of the steps" if finding.cost_share else "Steps"
    return f"{share} are skipped because gradients are not finite"


def _recompiles(finding: _FindingFacts) -> str:
    """Return `The same function is compiled again and again: ...`, or that it no longer is."""
    if finding.evidence.get("limit_reached") and finding.cost_share < WARNING_SHARE:
        return "A function is no longer compiled: its inputs differ too often"

    share = f"{percent_text(finding.cost_share)} of the run's time"
    return f"The same function is compiled again and again: {share}"


def _device_fault(finding: _FindingFacts) -> str:
    """Return `GPU 3 reports a fault`, or that several do."""
    devices = finding.evidence.get("devices") or []
    return f"GPU {devices[0]} reports a fault" if len(devices) == 1 else f"{len(devices)} GPUs report faults"


def _startup(finding: _FindingFacts) -> str:
    """Return `45 % of the run's time is start-up, before the first step`, or that most of it is compiling."""
    share = _run_share(finding)
    if finding.evidence.get("compile_share", 0) >= _HALF:
        return f"{share} is start-up, most of it torch.compile"

    before = ", before the first step" if "compile_s" not in finding.evidence else ""
    return f"{share} is start-up{before}"


def _evaluation(finding: _FindingFacts) -> str:
    """Return `60 % of the run's time is evaluation`, with the ranks that evaluate for all."""
    return f"{_run_share(finding)} is evaluation" + (f" on {ranks_text(finding.ranks)}" if finding.ranks else "")


def _run_share(finding: _FindingFacts) -> str:
    return f"{percent_text(finding.cost_share)} of the run's time" if finding.cost_share else "Part of the run's time"


def _throttled(finding: _FindingFacts) -> str:
    """Return `The driver lowers the clock of GPU 3: temperature`."""
    devices = finding.evidence.get("devices") or []
    which = f"GPU {devices[0]}" if len(devices) == 1 else f"{len(devices)} GPUs"
    return f"The driver lowers the clock of {which}: {finding.evidence.get('reason')}"


def _stopped(finding: _FindingFacts) -> str:
    """Return `Rank 1 stood still for 30 s`, or that its machine was suspended."""
    seconds, ranks = finding.evidence.get("stopped_s"), ranks_text(finding.ranks)
    how_long = "a while" if seconds is None else duration_text(float(seconds))
    if finding.evidence.get("suspended"):
        return f"The machine of {ranks} was suspended for {how_long}"

    return f"{capitalized(ranks)} stood still for {how_long}"


def _unknown(finding: _FindingFacts) -> str:
    words = capitalized(finding.kind.lower().replace("_", " "))
    where = f", in {phase_words(finding.phase)}" if finding.phase else ""
    return f"{words} on {ranks_text(finding.ranks)}{where} (unknown to this version of traceml)"


_STEP_TIME, _RUN_TIME, _STEPS = "step time", "the run's time", "the steps"


@dataclass(frozen=True, slots=True)
class KindRule:
    """Rules of a kind.

    Attributes:
        headline: a template with {share}, {phase}, {ranks_are}, {ranks} and {use}, or a function of the finding.
        severity: of a finding whose rule does not weigh it by its facts; None where the cost decides.
        is_straggler: whether it blames ranks that the others wait for.
        sorts_first: whether it comes before the kinds that are ordered by cost.
        critical_first: the same where it is critical.
        cost_of: the whole that its cost is a share of, in words; empty where the share says nothing to people.
    """

    headline: str | Callable[[_FindingFacts], str]
    severity: Severity | None = None
    is_straggler: bool = False
    sorts_first: bool = False
    critical_first: bool = False
    cost_of: str = _STEP_TIME

    @property
    def of_run(self) -> bool:
        """Whether its cost is a share of the run's wall time."""
        return self.cost_of == _RUN_TIME


_SLOW = KindRule("{ranks_are} slow in {phase}: the others wait, {share}", is_straggler=True)


class Kind(StrEnum):
    """The kinds of finding; `--fail-on` takes each. A reader of reports must expect more (`docs/verdicts.md`)."""

    _rule: KindRule

    HEALTHY = "HEALTHY", KindRule(_healthy, Severity.INFO)
    COMPUTE_BOUND = (
        "COMPUTE_BOUND",
        KindRule(_compute, Severity.INFO),
    )
    INPUT_BOUND = "INPUT_BOUND", KindRule(_input)
    H2D_BOUND = "H2D_BOUND", KindRule("Copies to the device slow training down: {share}")
    COMM_BOUND = "COMM_BOUND", KindRule("Communication between ranks slows training down: {share}")
    RESIDUAL_HEAVY = "RESIDUAL_HEAVY", KindRule(_user_code)
    INPUT_STRAGGLER = "INPUT_STRAGGLER", _SLOW
    COMPUTE_STRAGGLER = "COMPUTE_STRAGGLER", _SLOW
    H2D_STRAGGLER = "H2D_STRAGGLER", _SLOW
    STRAGGLER = "STRAGGLER", _SLOW
    CPU_CONTENTION = "CPU_CONTENTION", KindRule("The training waits for a CPU core: {share}")
    JITTER = "JITTER", KindRule("Some steps take far longer than the rest: {share}")
    STARTUP = "STARTUP", KindRule(_startup, cost_of=_RUN_TIME)
    EVAL_HEAVY = "EVAL_HEAVY", KindRule(_evaluation, cost_of=_RUN_TIME)
    CHECKPOINT_STALLS = "CHECKPOINT_STALLS", KindRule("Saving checkpoints slows training down: {share}")
    GC_PAUSES = "GC_PAUSES", KindRule("Garbage collection stops the training: {share}")
    RECOMPILES = "RECOMPILES", KindRule(_recompiles, cost_of=_RUN_TIME)
    THROTTLED = "THROTTLED", KindRule(_throttled, Severity.WARNING)
    DEVICE_FAULT = "DEVICE_FAULT", KindRule(_device_fault, critical_first=True, cost_of="")
    STOPPED = "STOPPED", KindRule(_stopped, cost_of=_RUN_TIME)
    STEPS_SKIPPED = "STEPS_SKIPPED", KindRule(_skipped, cost_of=_STEPS)
    SLOWDOWN = "SLOWDOWN", KindRule(_slowdown)
    DATA_IMBALANCE = (
        "DATA_IMBALANCE",
        KindRule("Batches differ in size, and ranks wait for the largest: {share}"),
    )
    DUPLICATE_DATA = "DUPLICATE_DATA", KindRule(_duplicates, cost_of="the ranks' work")
    NO_GRADIENT_SYNC = (
        "NO_GRADIENT_SYNC",
        KindRule("The ranks never exchange gradients: each trains its own model", Severity.WARNING),
    )
    NUMERIC = "NUMERIC", KindRule(_not_finite, Severity.CRITICAL, sorts_first=True, cost_of=_STEPS)
    LIMIT_NEAR = "LIMIT_NEAR", KindRule(_limit)
    MEMORY_LEAK = "MEMORY_LEAK", KindRule(_leak, critical_first=True)
    MEMORY_PRESSURE = "MEMORY_PRESSURE", KindRule(_pressure, Severity.WARNING)
    MEMORY_IMBALANCE = "MEMORY_IMBALANCE", KindRule("{ranks} {use} far more memory than the others")
    ALLOCATOR_CHURN = (
        "ALLOCATOR_CHURN",
        KindRule("Device memory is given back to the driver in each step", Severity.WARNING, cost_of=""),
    )
    HANG = "HANG", KindRule(_hang, Severity.CRITICAL, sorts_first=True, cost_of="")
    RANK_LOST = "RANK_LOST", KindRule(_lost_ranks, Severity.CRITICAL, sorts_first=True, cost_of="")
    WORKER_LOST = "WORKER_LOST", KindRule(_lost_worker, Severity.WARNING, sorts_first=True)
    INSUFFICIENT_DATA = "INSUFFICIENT_DATA", KindRule("Not enough data for a verdict", Severity.INFO)

    def __new__(cls, value: str, rule: KindRule) -> Kind:
        """Make the member of one declaration."""
        kind = str.__new__(cls, value)
        kind._value_, kind._rule = value, rule
        return kind

    @classmethod
    def _missing_(cls, value: object) -> Kind | None:
        """Accept a kind that a newer traceml wrote; it is not in the list of kinds, and its headline says so."""
        if not isinstance(value, str):
            return None

        unknown = str.__new__(cls, value)
        unknown._name_ = unknown._value_ = value
        unknown._rule = KindRule(_unknown)
        return unknown

    @property
    def rule(self) -> KindRule:
        """The declaration above."""
        return self._rule

    def severity_for(self, cost_share: float) -> Severity:
        """Return the severity of a finding of this kind.

        Args:
            cost_share: share of step time that it costs.
        """
        by_cost = Severity.CRITICAL if cost_share >= CRITICAL_SHARE else Severity.WARNING
        return self.rule.severity or by_cost

    def headline(self, finding: _FindingFacts) -> str:
        """Return a finding of this kind as one sentence without a period."""
        rule = self.rule.headline
        if not isinstance(rule, str):
            return rule(finding)

        whole = self.rule.cost_of
        share = f"{percent_text(finding.cost_share)} of {whole}" if finding.cost_share else f"part of {whole}"
        group = finding.evidence.get("rank_group") or {}
        ranks = capitalized(group.get("words") or ranks_text(finding.ranks))
        are, use = ("is", "uses") if len(finding.ranks) == 1 else ("are", "use")
        phase = phase_words(finding.phase) if finding.phase else "the step"
        return capitalized(rule.format(share=share, phase=phase, ranks_are=f"{ranks} {are}", ranks=ranks, use=use))
