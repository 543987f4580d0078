"""Kinds of finding: each is declared here, once, with its headline, and its severity unless the cost decides it."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

import msgspec

from traceml.diagnosis import headlines

__all__ = ["CRITICAL_SHARE", "FLOOR_NS", "WARNING_SHARE", "Kind", "KindRule", "Severity", "least_cost_ns"]

WARNING_SHARE = 0.10
"""A timing finding costs at least this share of step time."""
CRITICAL_SHARE = 0.25
"""From this share on a timing finding is critical."""
FLOOR_NS = 1e6
"""Costs below a millisecond per step are not reported: a toy's loader, loss function and Python cost that much."""


def least_cost_ns(step_ns: float, share: float = WARNING_SHARE) -> float:
    """Return the cost per step from which on a timing finding is reported."""
    return max(FLOOR_NS, share * step_ns)


class Severity(StrEnum):
    """Weight of a finding, which also gives its color: green, yellow, red."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"


_STEP_TIME, _RUN_TIME, _STEPS = "step time", "the run's time", "the steps"


class KindRule(msgspec.Struct, frozen=True):
    """Rules of a kind."""

    # a template with {share}, {devices} or {reason}, or a function of the finding
    headline: str | Callable[[headlines.FindingFacts], str]
    # of a finding whose rule does not weigh it by its facts; None if the cost decides
    severity: Severity | None = None
    is_straggler: bool = False  # whether it blames ranks that the others wait for
    sorts_first: bool = False  # whether it comes before the kinds that are ordered by cost
    critical_first: bool = False  # the same where it is critical
    # the whole that its cost is a share of, in words; empty if the share says nothing to people
    cost_of: str = _STEP_TIME

    @property
    def of_run(self) -> bool:
        """Whether its cost is a share of the run's wall time."""
        return self.cost_of == _RUN_TIME


_SLOW = KindRule(headlines.slow_ranks, is_straggler=True)


class Kind(StrEnum):
    """The kinds of finding; `--fail-on` takes each. A reader of reports must expect more (`docs/verdicts.md`)."""

    _rule: KindRule

    HEALTHY = "HEALTHY", KindRule(headlines.healthy, Severity.INFO)
    COMPUTE_BOUND = "COMPUTE_BOUND", KindRule(headlines.compute, Severity.INFO)
    INPUT_BOUND = "INPUT_BOUND", KindRule(headlines.input_wait)
    H2D_BOUND = "H2D_BOUND", KindRule("Copies to the device slow training down: {share}")
    COMM_BOUND = "COMM_BOUND", KindRule(headlines.communication)
    RESIDUAL_HEAVY = "RESIDUAL_HEAVY", KindRule(headlines.user_code)
    INPUT_STRAGGLER = "INPUT_STRAGGLER", _SLOW
    COMPUTE_STRAGGLER = "COMPUTE_STRAGGLER", _SLOW
    H2D_STRAGGLER = "H2D_STRAGGLER", _SLOW
    STRAGGLER = "STRAGGLER", _SLOW
    CPU_CONTENTION = "CPU_CONTENTION", KindRule(headlines.core_wait)
    DEVICE_CONTENTION = "DEVICE_CONTENTION", KindRule("Other programs compute on {devices}: {share}")
    GIL_CONTENTION = (
        "GIL_CONTENTION",
        KindRule("The training waits for Python's lock, which another thread holds: {share}"),
    )
    JITTER = "JITTER", KindRule(headlines.long_steps)
    STARTUP = "STARTUP", KindRule(headlines.startup, cost_of=_RUN_TIME)
    EVAL_HEAVY = "EVAL_HEAVY", KindRule(headlines.evaluation, cost_of=_RUN_TIME)
    AFTER_STEPS = "AFTER_STEPS", KindRule(headlines.after_steps, cost_of=_RUN_TIME)
    CHECKPOINT_STALLS = "CHECKPOINT_STALLS", KindRule("Saving checkpoints slows training down: {share}")
    GC_PAUSES = "GC_PAUSES", KindRule("Garbage collection stops the training: {share}")
    RECOMPILES = "RECOMPILES", KindRule(headlines.recompiles, cost_of=_RUN_TIME)
    THROTTLED = "THROTTLED", KindRule("The driver lowers the clock of {devices}: {reason}", Severity.WARNING)
    DEVICE_FAULT = "DEVICE_FAULT", KindRule(headlines.device_fault, critical_first=True, cost_of="")
    STOPPED = "STOPPED", KindRule(headlines.stopped, cost_of=_RUN_TIME)
    STEPS_SKIPPED = "STEPS_SKIPPED", KindRule(headlines.skipped, cost_of=_STEPS)
    SLOWDOWN = "SLOWDOWN", KindRule(headlines.slowdown)
    DATA_IMBALANCE = "DATA_IMBALANCE", KindRule("Batches differ in size, and ranks wait for the largest: {share}")
    DUPLICATE_DATA = "DUPLICATE_DATA", KindRule(headlines.duplicates, cost_of="the ranks' work")
    NO_GRADIENT_SYNC = (
        "NO_GRADIENT_SYNC",
        KindRule("The ranks never exchange gradients: each trains its own model", Severity.WARNING),
    )
    EVAL_MODE = "EVAL_MODE", KindRule("The model is trained in eval()", cost_of="")
    NO_ZERO_GRAD = "NO_ZERO_GRAD", KindRule("The gradients are never cleared", Severity.WARNING)
    WEIGHTS_UNCHANGED = (
        "WEIGHTS_UNCHANGED",
        KindRule("The training changes no weights", critical_first=True, cost_of=""),
    )
    NUMERIC = "NUMERIC", KindRule(headlines.not_finite, Severity.CRITICAL, critical_first=True, cost_of=_STEPS)
    LIMIT_NEAR = "LIMIT_NEAR", KindRule(headlines.near_limit)
    MEMORY_LEAK = "MEMORY_LEAK", KindRule(headlines.leak, critical_first=True)
    MEMORY_PRESSURE = "MEMORY_PRESSURE", KindRule(headlines.pressure, Severity.WARNING)
    MEMORY_IMBALANCE = "MEMORY_IMBALANCE", KindRule(headlines.uneven_memory)
    ALLOCATOR_CHURN = (
        "ALLOCATOR_CHURN",
        KindRule("Device memory is given back to the driver in each step", Severity.WARNING, cost_of=""),
    )
    HANG = "HANG", KindRule(headlines.hang, Severity.CRITICAL, sorts_first=True, cost_of="")
    RANK_LOST = "RANK_LOST", KindRule(headlines.lost_ranks, Severity.CRITICAL, sorts_first=True, cost_of="")
    WORKER_LOST = "WORKER_LOST", KindRule(headlines.lost_worker, Severity.WARNING, sorts_first=True)
    INSUFFICIENT_DATA = "INSUFFICIENT_DATA", KindRule(headlines.insufficient_data, Severity.INFO)

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
        unknown._rule = KindRule(headlines.unknown)
        return unknown

    @property
    def rule(self) -> KindRule:
        """The declaration above."""
        return self._rule

    def severity_for(self, cost_share: float) -> Severity:
        """Return the severity of a finding of this kind."""
        return self.rule.severity or (Severity.CRITICAL if cost_share >= CRITICAL_SHARE else Severity.WARNING)

    def headline(self, finding: headlines.FindingFacts) -> str:
        """Return a finding of this kind as one sentence without a period."""
        rule = self.rule.headline
        if not isinstance(rule, str):
            return rule(finding)

        share, evidence = headlines.share_text(finding, self.rule.cost_of), finding.evidence
        return rule.format(share=share, devices=headlines.devices_text(evidence), reason=evidence.get("reason"))
