"""Cost of a part of the step: what a run without it would save, in which lines it is, and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from traceml.diagnosis.facts.blamed_lines import (
    BlamedLine,
    blamed_line,
    leading_lines,
    line_without_hidden,
    own_line,
    unless_trainer,
)
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.facts.sampled_shares import counted_lines
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import WARNING_SHARE, Kind, least_cost_ns
from traceml.diagnosis.steps.own_work import OwnWork, have_half
from traceml.diagnosis.steps.speedup import saved_ns, speedup, without_rare
from traceml.diagnosis.steps.step_split import Floats
from traceml.formatting import gain_text, ns_text, percent_text

__all__ = ["RARE_FACTOR", "RARE_STEPS", "PhaseCost", "cost_of"]

RARE_FACTOR = 1.1
"""Rare long steps are not counted if a part costs more than this factor with them."""
_TURNS_RATIO = 1.5
"""Ranks have a part in turns if steps lose this many times the mean of the rank with most of it,"""
_NOT_IN_TURN_SHARE, _TURNS_STEPS = 0.25, 0.7
"""and half of the ranks have less than this share of the longest, in this share of the steps."""
_UNEVEN_RATIO = 1.25
"""They have it unevenly if steps lose this many times the mean of the rank with most of it."""
_CHANCE_ERRORS = 1.0
"""Ranks differ by chance up to so many standard errors beyond the largest deviation that is usual for their number."""
RARE_STEPS = "rare long steps"
_LISTED = 16  # ranks in the evidence


class PhaseCost(msgspec.Struct, frozen=True):
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

    def scaled(self, share: float, *excluded: str) -> PhaseCost:
        """Return a share of it; the rest is what `excluded` names."""
        return replace(
            self, removed=self.removed * share, saved_ns=self.saved_ns * share, share=share, excluded=excluded
        )

    def reported(self) -> PhaseCost:
        """Return the cost with the rare long steps, as a screen shows the part; without them if they are much of it."""
        values = self.work.parts[self.part]
        removed = values * np.float32(self.share)
        saved = saved_ns(self.work, {self.part: values - removed})
        if saved > RARE_FACTOR * self.saved_ns:
            return replace(self, excluded=(RARE_STEPS, *self.excluded))

        return replace(self, removed=removed, saved_ns=max(saved, self.saved_ns))

    @property
    def of_step(self) -> str:
        """The cost in words: `20.4 ms of each 31 ms step (65 %)`."""
        share = percent_text(self.saved_ns / self.step_ns)
        less = f", not counting {' and '.join(self.excluded)}" if self.excluded else ""
        return f"{ns_text(self.saved_ns)} of each {ns_text(self.step_ns)} step ({share}{less})"

    @property
    def in_turns(self) -> bool:
        """Whether ranks have it in turns: half of them have little in most steps, and it costs more than the mean."""
        by_rank = self.removed.mean(axis=1)
        if self.ranks or len(by_rank) < 2 or self.saved_ns < _TURNS_RATIO * float(by_rank.max()):
            return False

        little = self.removed < _NOT_IN_TURN_SHARE * self.removed.max(axis=0)
        return float((little.mean(axis=0) >= 0.5).mean()) >= _TURNS_STEPS

    @property
    def is_uneven(self) -> bool:
        """Whether it costs far more than any rank has on average: another one has most of it from step to step."""
        by_rank = self.removed.mean(axis=1)
        return not self.ranks and len(by_rank) > 1 and self.saved_ns >= _UNEVEN_RATIO * float(by_rank.max())

    @property
    def turns_words(self) -> str:
        """That in words: `, by the ranks in turns (each spends 20.7 ms per step on average)`; empty if it is not so."""
        mean_ns = float(self.removed.mean())
        if self.in_turns:
            return f", by the ranks in turns (each spends {ns_text(mean_ns)} per step on average)"

        uneven = (
            f", unevenly: a rank spends {ns_text(mean_ns)} per step on average, and the others wait for the longest"
        )
        return uneven if self.is_uneven else ""

    @property
    def faster(self) -> str:
        """The gain in words: `2.9x faster`."""
        return gain_text(speedup(self.step_ns, self.saved_ns))

    def line(self, facts: JobFacts) -> BlamedLine | None:
        """Return the line of the user's code that most of it is spent in, where the samples show it."""
        return unless_trainer(facts.lines, self.sampled_line(facts))

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
        line = blamed_line(self._counted(facts), self.part, sampled_share, self.ranks)
        return line_without_hidden(line, self._phase_share, self.hidden_ns / self.step_ns)

    def _counted(self, facts: JobFacts) -> Sequence[SampledLine]:
        return counted_lines(facts.lines) if self.uncounted else facts.lines

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
        values, ranks = self.work.parts[self.part], self.work.ranks[:_LISTED].tolist()
        means = (values[:_LISTED].mean(axis=1) / 1e6).tolist()
        return Finding.of(
            kind,
            ranks=self.ranks,
            phase=self.part,
            summary=summary,
            next=action,
            evidence={
                "step_ms": self.step_ns / 1e6,
                "phase_ms": float(values.mean()) / 1e6,
                "phase_p50_ms": float(np.median(values)) / 1e6,
                "phase_ms_by_rank": {str(rank): mean for rank, mean in zip(ranks, means, strict=True)},
                "compute_ms": self.work.compute_ns / 1e6,
                "steps": values.shape[1],
                **evidence,
            },
            cost_share=self.saved_ns / self.step_ns,
            speedup_if_fixed=speedup(self.step_ns, self.saved_ns) if gain is None else gain,
        )


def cost_of(work: OwnWork, part: str, step_ns: float, *, rare_share: float) -> PhaseCost:
    """Return the cost of a part without its rare long steps.

    A part that only half of the ranks or fewer have saves nothing: stragglers are a finding of their own.
    """
    values = work.parts[part]
    removed = without_rare(values, rare_share)
    has = _have_much(removed)
    saved = saved_ns(work, {part: values - removed}) if has.mean() > 0.5 else 0.0
    return PhaseCost(work, part, step_ns, work.named(has), removed, saved)


def _have_much(values: Floats) -> NDArray[np.bool_]:
    """Return which ranks have half of what the rank with most has; all if they differ no more than by chance."""
    means = values.mean(axis=1)
    has = have_half(means)
    if has.all():
        return has

    error = float((values.var(axis=1).mean() / values.shape[1]) ** 0.5)
    # The largest of n normal deviations is about sqrt(2 log n).
    by_chance = (2 * np.log(len(means))) ** 0.5 + _CHANCE_ERRORS
    return has | bool(np.abs(means - means.mean()).max() <= by_chance * error)
