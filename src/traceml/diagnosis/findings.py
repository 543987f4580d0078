"""What a diagnosis says: findings, their kinds, and how heavy they weigh."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

__all__ = ["CRITICAL_SHARE", "WARNING_SHARE", "Finding", "Kind", "Severity", "in_order", "plain", "severity_of"]

WARNING_SHARE = 0.10
"""A timing finding costs at least this share of step time."""
CRITICAL_SHARE = 0.25
"""From this share on a finding is critical."""


class Kind(StrEnum):
    """The kinds of finding which are told today; a caller must expect more (`docs/verdicts.md`)."""

    HEALTHY = "HEALTHY"
    COMPUTE_BOUND = "COMPUTE_BOUND"
    INPUT_BOUND = "INPUT_BOUND"
    H2D_BOUND = "H2D_BOUND"
    COMM_BOUND = "COMM_BOUND"
    RESIDUAL_HEAVY = "RESIDUAL_HEAVY"
    INPUT_STRAGGLER = "INPUT_STRAGGLER"
    COMPUTE_STRAGGLER = "COMPUTE_STRAGGLER"
    H2D_STRAGGLER = "H2D_STRAGGLER"
    STRAGGLER = "STRAGGLER"
    JITTER = "JITTER"
    RANK_LOST = "RANK_LOST"
    INSUFFICIENT_DATA = "INSUFFICIENT_DATA"


class Severity(StrEnum):
    """How heavy a finding weighs."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"


_OUTRANKING = frozenset({Kind.RANK_LOST})


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One diagnosed cause, with the numbers it rests on.

    Attributes:
        kind: which cause.
        severity: info, warning or critical.
        ranks: the ranks meant; empty where all are.
        phase: the part of the step, or the user's phase by its name; None where none is meant.
        summary: one sentence of cause, with numbers.
        next: one sentence of action.
        evidence: the numbers (and, for an exception, file and line) behind the summary.
        cost_share: share of step time it costs, 0..1.
        speedup_if_fixed: old / new step time if it were gone.
    """

    kind: Kind
    severity: Severity
    summary: str
    next: str
    ranks: tuple[int, ...] = ()
    phase: str | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)
    cost_share: float = 0.0
    speedup_if_fixed: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as the report's JSON has it: plain numbers, lists and texts."""
        return {
            "kind": self.kind.value,
            "severity": self.severity.value,
            "ranks": list(self.ranks),
            "phase": self.phase,
            "summary": self.summary,
            "next": self.next,
            "evidence": plain(dict(self.evidence)),
            "cost_share": round(float(self.cost_share), 4),
            "speedup_if_fixed": round(float(self.speedup_if_fixed), 3),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Finding:
        """Return the finding that `to_dict` wrote."""
        return cls(
            kind=Kind(data["kind"]),
            severity=Severity(data["severity"]),
            summary=data["summary"],
            next=data["next"],
            ranks=tuple(data["ranks"]),
            phase=data["phase"],
            evidence=data["evidence"],
            cost_share=data["cost_share"],
            speedup_if_fixed=data["speedup_if_fixed"],
        )


def severity_of(share: float) -> Severity:
    """Return the severity of a timing finding that costs this share of step time."""
    return Severity.CRITICAL if share >= CRITICAL_SHARE else Severity.WARNING


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings with the verdict first: a lost rank outranks timing, then the largest cost."""
    return sorted(findings, key=lambda finding: (finding.kind not in _OUTRANKING, -finding.cost_share))


def plain(value: Any) -> Any:
    """Return `value` as JSON can hold it: numpy numbers as Python's, NaN and infinity as None, floats to 6 digits."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}

    if isinstance(value, np.ndarray | list | tuple | set | frozenset):
        return [plain(item) for item in value]

    if isinstance(value, bool | np.bool_):
        return bool(value)

    if isinstance(value, int | np.integer):
        return int(value)

    if isinstance(value, float | np.floating):
        return float(f"{float(value):.6g}") if math.isfinite(value) else None

    return value if value is None or isinstance(value, str) else str(value)
