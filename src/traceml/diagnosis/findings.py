"""Findings of a diagnosis, and their order."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, SupportsFloat

import msgspec

from traceml.diagnosis import headlines
from traceml.diagnosis.kinds import WARNING_SHARE, Kind, Severity
from traceml.formatting import count_text

__all__ = ["Explanation", "Finding", "in_order", "known_facts", "plain", "significant", "with_global_step_numbers"]

_NUMBERS = (
    "step", "last_step", "since_step", "until_step", "apart_since_step", "counted_at_step", "waiting_step",
    "checkpoint_before_step",
)  # fmt: skip
_IN_TEXT = re.compile(r"(?<=\bstep )\d+(?:,\d{3})*")


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One diagnosed cause, with the numbers it rests on; an entry of the report's `findings`.

    Attributes:
        kind: the cause.
        severity: info, warning or critical.
        ranks: the affected ranks; empty for all.
        phase: a phase of the step, or the user's phase by its name; None if the finding has none.
        summary: one sentence about the cause, with numbers.
        next: one sentence about what to do.
        evidence: the numbers (and, for an exception, file and line) behind the summary.
        cost_share: share that it costs of what `kind.rule.cost_of` names (step time, the run's time), 0..1.
        speedup_if_fixed: old / new step time if it were gone.
    """

    kind: Kind
    severity: Severity
    ranks: tuple[int, ...] = ()
    phase: str | None = None
    summary: str
    next: str
    evidence: dict[str, Any] = {}
    cost_share: float = 0.0
    speedup_if_fixed: float = 1.0

    @classmethod
    def of(
        cls,
        kind: Kind,
        *,
        summary: str,
        next: str,  # noqa: A002 - the name of the field
        evidence: Mapping[str, Any],
        severity: Severity | None = None,
        ranks: tuple[int, ...] = (),
        phase: str | None = None,
        cost_share: float = 0.0,
        speedup_if_fixed: float = 1.0,
    ) -> Finding:
        """Return a finding; its severity follows from kind and cost, unless it is given."""
        return cls(
            kind=kind,
            severity=severity or kind.severity_for(cost_share),
            ranks=ranks,
            phase=phase,
            summary=summary,
            next=next,
            evidence=dict(evidence),
            cost_share=cost_share,
            speedup_if_fixed=speedup_if_fixed,
        )

    @property
    def gain(self) -> float | None:
        """The speed-up if it were fixed; None below half a percent."""
        return self.speedup_if_fixed if self.speedup_if_fixed >= 1.005 else None

    @property
    def blames_ranks(self) -> bool:
        """Whether it is about ranks that the others wait for; saving checkpoints may be that."""
        return self.kind.rule.is_straggler or "excess_ms" in self.evidence

    @property
    def is_critical(self) -> bool:
        """Whether it has the highest severity."""
        return self.severity is Severity.CRITICAL

    @property
    def is_urgent(self) -> bool:
        """Whether it comes before the findings that are ordered by cost."""
        rule = self.kind.rule
        return rule.sorts_first or (rule.critical_first and self.is_critical)

    @property
    def headline(self) -> str:
        """The finding in one sentence without a period."""
        is_costly = self.cost_share >= WARNING_SHARE
        facts = (self.kind, self.ranks, self.phase, self.cost_share, self.evidence, self.is_critical, is_costly)
        text = self.kind.headline(headlines.FindingFacts(*facts))
        is_beside = "pause_share" in self.evidence and self.kind not in (Kind.HEALTHY, Kind.COMPUTE_BOUND)
        return f"{text}, not counting {headlines.pauses_text(self.evidence)}" if is_beside else text

    def with_part(self, more: Explanation) -> Finding:
        """Return the finding with a further sentence, which begins with a space, advice and numbers."""
        return msgspec.structs.replace(
            self,
            summary=self.summary + more.text,
            next=" ".join(filter(None, (self.next, more.action))),
            evidence={**self.evidence, **more.evidence},
        )

    def rounded(self) -> Finding:
        """Return the finding as the report has it: plain numbers, lists and texts, in few digits.

        Cost and gain keep six: rounded again for a headline, they must not differ from the summary, which was not.
        """
        return msgspec.structs.replace(
            self,
            evidence=plain(self.evidence),
            cost_share=round(float(self.cost_share), 6),
            speedup_if_fixed=round(float(self.speedup_if_fixed), 6),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the rounded finding as a plain dict."""
        built: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self.rounded()))
        return built

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Finding:
        """Return the finding that `to_dict` wrote.

        Raises:
            msgspec.ValidationError: the data is not a finding.
        """
        return msgspec.convert(data, cls)


def in_order(findings: Iterable[Finding], in_steps: float = 1.0) -> list[Finding]:
    """Return the findings with the verdict first: urgent ones (a lost rank, a hang), then by cost in wall time.

    Args:
        in_steps: share of the run's wall time in steps; most costs are shares of step time.
    """

    def cost(finding: Finding) -> float:
        return finding.cost_share * (1.0 if finding.kind.rule.of_run else in_steps)

    return sorted(findings, key=lambda finding: (not finding.is_urgent, -cost(finding)))


def with_global_step_numbers(found: Finding, before: int) -> Finding:
    """Return a finding with the step numbers of the whole training, which a script that resumes counts on.

    The rules judge the steps of one process, which are counted from 0.

    Args:
        before: steps in the checkpoint from which it resumed; 0: it did not.
    """
    known = {name: found.evidence[name] for name in _NUMBERS if isinstance(found.evidence.get(name), int)}
    if not before or not known:
        return found

    shifted = {count_text(number): count_text(number + before) for number in known.values()}
    said = str(found.evidence.get("exception") or "")  # the numbers in it are the script's own

    def counted_on(text: str) -> str:
        parts = text.split(said) if said else [text]
        return said.join(_IN_TEXT.sub(lambda number: shifted.get(number[0], number[0]), part) for part in parts)

    return msgspec.structs.replace(
        found,
        summary=counted_on(found.summary),
        next=counted_on(found.next),
        evidence={**found.evidence, **{name: number + before for name, number in known.items()}, "resumed_at": before},
    )


class Explanation(NamedTuple):
    """A part of a finding: a sentence, what to do, and the numbers behind it."""

    text: str = ""
    action: str = ""
    evidence: Mapping[str, Any] = {}


def known_facts(**facts: Any) -> dict[str, Any]:
    """Return the facts that are known: not None."""
    return {name: fact for name, fact in facts.items() if fact is not None}


def significant(value: SupportsFloat | None) -> float | None:
    """Return a number to 6 digits; None for None, NaN and infinity."""
    return float(f"{float(value):.6g}") if value is not None and math.isfinite(value) else None


def plain(value: Any) -> Any:
    """Return `value` as JSON data: numpy numbers as Python's, NaN and infinity as None, floats to 6 digits."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}

    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]

    if isinstance(value, float):
        return significant(value)

    if value is None or isinstance(value, bool | int | str):
        return value

    # Not by numpy's types: importing them takes as long as the rest of the card that shows a finished report.
    return plain(value.tolist()) if hasattr(value, "tolist") else str(value)
