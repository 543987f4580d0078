"""Phases of the step that became longer, and the line of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from traceml.diagnosis.facts.blamed_lines import (
    BlamedLine,
    changed_line,
    leading_lines,
    own_line,
    unless_trainer,
)
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.facts.sampled_shares import MIN_SAMPLES, of_part
from traceml.diagnosis.rules.slowdowns.slow_steps import DOMINANT_SHARE, SlowSteps
from traceml.diagnosis.steps.own_work import COMPUTE, UNNAMED_CODE
from traceml.formatting import phase_words, phases_text

__all__ = [
    "COMM", "NOT_OF_CORES", "PASSES", "SlowParts", "computes_longer", "find_parts", "have_cores", "most_grown",
    "part_of_ranks", "slow_phases",
]  # fmt: skip

COMM = "comm"
NOT_OF_CORES = 2.5
"""A slowdown by this factor or more is not explained by a slower core: another thread on it, or a lower clock."""
SIMILAR_FACTOR = 0.5
"""If the rest of the step is slower by this share of the blamed phase's factor, all phases are."""
MIN_COMPARED_SHARE = 0.25
"""The rest of a rank's work, which is not slower, is at least this share of the slower phase to be compared with."""
HAS_CORE_WAIT = 0.05
"""A rank has its core if it waits for one for less of the time."""
JOINT_SHARE = 0.9
"""If no phase has most of the difference, the fewest phases that have this share of it together are blamed."""
MIN_REST_SHARE = 0.02
"""The rest of the step is compared if it has at least this share of it: a phase that takes no time is no faster."""
MUCH_COMPUTATION = 0.25
"""If forward, backward and optimizer have this share of the difference, disks are not the cause."""
NEARLY_ALL = 0.9
"""If slow steps have this share of a phase's time, they are taken to have all of its samples."""
MIN_SLOW_SAMPLES, MIN_SLOW_SAMPLES_OF_ALL = 5, 3
"""Fewer samples of the slow steps do not show that they run no other line than the steps before; of one that has nearly
all of the phase, fewer than the second number."""
PASSES = {"forward", "backward"}
_OTHER = "other"
_FOLLOWING = ("backward", "optimizer", COMM)  # longer for what the phases before them do: a larger graph, more to send


class SlowParts(NamedTuple):
    """Part of the step that became slower."""

    parts: tuple[str, ...] = ()  # phases that are blamed, the one that may be the cause first; empty if none is
    # phases that have nearly all of it, where fewer cores may be the cause of that; empty if all are alike
    leading: tuple[str, ...] = ()
    is_loss_of_cores: bool = False  # whether the loss of cores explains it
    line: BlamedLine | None = None  # of the first phase, by which the slow steps are longer
    phase_share: float = 0.0  # that phase's share of them
    two: tuple[BlamedLine, ...] = ()  # two lines that most of that phase is spent in, where no line alone is known

    @property
    def text(self) -> str:
        """The end of the sentence; empty if cores were taken."""
        if len(self.parts) == 1:
            return f", in {phase_words(self.parts[0])}" + (self.line.of_it if self.line else "")

        if self.parts:
            return f", in {phases_text(self.parts, self.line.place if self.line else None)}"

        if self.leading:
            return f", most of it in {phases_text(self.leading, None)}"

        return "" if self.is_loss_of_cores else ", in all phases alike"

    def evidence(self) -> dict[str, Any]:
        """Return the phases, if there are several, and the line."""
        phases = {"phases": list(self.parts)} if len(self.parts) > 1 else {}
        return phases | (self.line.evidence(self.phase_share) if self.line else {})


def find_parts(steps: SlowSteps, facts: JobFacts, ranks: tuple[int, ...]) -> SlowParts:
    """Return what became slower, by the lines of these ranks, or of all."""
    parts = slow_phases(steps, facts)
    if not parts:
        return SlowParts(leading=_together(*steps.levels()))

    line, phase_share = (None, 0.0) if parts[0] == COMM else _line(steps, facts, parts[0], ranks)
    # Ranks may have had a core for a small and varying share of the time: other code enters the kernel most often.
    may_be_cores = facts.oversubscribed and steps.change.factor * (1.0 - facts.wait_share) < 1.0
    if parts[0] == _OTHER and line is None and may_be_cores:
        return SlowParts(is_loss_of_cores=True)

    is_code = line is None and parts[0] in UNNAMED_CODE
    two = leading_lines(facts.lines, parts[0], steps.phase_share(parts[0])) if is_code else ()
    return SlowParts(parts, line=line, phase_share=phase_share, two=two)


def part_of_ranks(steps: SlowSteps, facts: JobFacts, ranks: tuple[int, ...], part: str) -> SlowParts:
    """Return the phase in which some ranks alone became slower, with its line."""
    line, phase_share = _line(steps, facts, part, ranks)
    return SlowParts((part,), line=line, phase_share=phase_share)


def slow_phases(steps: SlowSteps, facts: JobFacts) -> tuple[str, ...]:
    """Return the phases that became longer while the rest did not, the one that may be the cause first; none if all.

    Where a part of the run has fewer cores, or they are slower, some phases become longer than others, too: several are
    named together only if steps are slower than that would make them, or the ranks had their cores. Communication also
    takes longer where ranks meet later: it is among them only in the first case.
    """
    part = most_grown(steps, facts)
    if part is not None:
        return (part,)

    parts = _together(*steps.levels())
    if steps.change.factor >= NOT_OF_CORES:
        return parts

    return parts if parts and COMM not in parts and have_cores(steps, parts, facts) else ()


def most_grown(steps: SlowSteps, facts: JobFacts) -> str | None:
    """Return the phase that has most of the difference, and grew by far more than the rest; None if all grew.

    With too few cores each computing phase counts by itself: what else varies would hide that it grew.
    """
    usual, slow = steps.levels()
    differences = {name: slow[name] - usual[name] for name in usual}
    whole = sum(value for value in differences.values() if value > 0)
    part = max(differences, key=lambda name: differences[name], default=None)
    if part is None or not differences[part] >= DOMINANT_SHARE * whole > 0:
        return None

    rest, more = (sum(values.values()) - values[part] for values in (usual, differences))
    similar = SIMILAR_FACTOR * differences[part] / max(usual[part], 1.0)
    if facts.oversubscribed and any(differences[name] >= similar * usual[name] for name in _compared(usual, part)):
        return None

    return part if more / max(rest, 1.0) < similar else None


def computes_longer(steps: SlowSteps) -> bool:
    """Return whether much of what became longer is computation, which waits for no disk."""
    usual, slow = steps.levels()
    more = {name: max(slow[name] - usual[name], 0.0) for name in usual}
    return sum(more.get(name, 0.0) for name in COMPUTE) >= MUCH_COMPUTATION * max(sum(more.values()), 1.0)


def _compared(usual: Mapping[str, float], part: str) -> list[str]:
    """Return the other computing phases that are long enough to compare one with."""
    least = MIN_COMPARED_SHARE * usual[part]
    return [name for name in COMPUTE if name != part and usual.get(name, 0.0) >= least] if part in COMPUTE else []


def _together(usual: Mapping[str, float], slow: Mapping[str, float]) -> tuple[str, ...]:
    """Return the fewest phases that have nearly all of the difference; none if the rest became slower, too."""
    differences = {name: slow[name] - usual[name] for name in usual}
    ordered = sorted(usual, key=lambda name: -differences[name])
    whole = sum(value for value in differences.values() if value > 0)
    heads = (ordered[:count] for count in range(1, len(ordered)))
    some = next((each for each in heads if _sum(differences, each) >= JOINT_SHARE * whole), [])
    rest = [name for name in ordered if name not in some]
    own, least = _sum(usual, some), SIMILAR_FACTOR * _sum(differences, some)
    if _sum(usual, rest) < MIN_REST_SHARE * sum(usual.values()):
        return ()

    if not some or whole <= 0 or _sum(differences, rest) * max(own, 1.0) >= least * max(_sum(usual, rest), 1.0):
        return ()

    return tuple(sorted(some, key=lambda name: name in _FOLLOWING))


def _sum(values: Mapping[str, float], names: Sequence[str]) -> float:
    return sum(values[name] for name in names)


def have_cores(steps: SlowSteps, parts: Sequence[str], facts: JobFacts) -> bool:
    """Return whether ranks had their cores meanwhile: the kernel counted, and other work did not become slower.

    If there is no other work to compare with, the steps are far slower than a core that is shared would make them.
    """
    usual, _ = steps.levels()
    own = sum(usual[part] for part in parts)
    compared = sum(value for name, value in usual.items() if name not in (*parts, COMM))
    waited = facts.samples.use(*steps.slow_range, steps.ranks()).waited
    is_compared = compared >= MIN_COMPARED_SHARE * own or steps.change.factor >= NOT_OF_CORES
    return waited is not None and waited < HAS_CORE_WAIT and is_compared


def _line(steps: SlowSteps, facts: JobFacts, part: str, ranks: tuple[int, ...]) -> tuple[BlamedLine | None, float]:
    """Return the line by which the slow steps are longer, and the share of them that the phase has.

    Without samples that are told apart by steps, it is the line that has most of the phase in the whole run.
    """
    usual, slow, starts = steps.usual, steps.slow, steps.starts
    at = np.flatnonzero(slow)
    seen, before = facts.divided_lines(range(starts[at[0]], starts[at[-1] + 1]))
    of_run = steps.phase_share(part)
    if not seen or not before:
        return own_line(facts.lines, part, of_run, ranks), of_run

    if ranks:
        seen, before = ([each for each in some if each.rank in ranks] for some in (seen, before))

    share, step_ns = steps.phase_share(part, slow), steps.bins.step_ns
    pace = float(np.median(step_ns[usual]) / max(np.median(step_ns[slow]), 1.0))
    line = changed_line(seen, part, share, before, pace)
    if line is None and steps.phase_ns(part, slow) >= NEARLY_ALL * steps.phase_ns(part):
        line = own_line([*seen, *before], part, of_run)  # whenever the samples were taken, they are of slow steps

    return unless_trainer(seen, line or _line_of_few(seen, before, part, of_run)), share


def _line_of_few(
    seen: Sequence[SampledLine], before: Sequence[SampledLine], part: str, share: float
) -> BlamedLine | None:
    """Return the line that has most of a phase in all steps, if the few samples of slow steps are all of that line.

    Beside other programs the sampler runs seldom, and its intervals may have nearly all samples of a short run before
    its last steps.
    """
    of_slow = of_part(seen, part)
    samples = sum(each.samples for each in of_slow)
    if not MIN_SLOW_SAMPLES_OF_ALL <= samples < MIN_SAMPLES:
        return None

    line = own_line([*seen, *before], part, share)
    if line is None or (samples < MIN_SLOW_SAMPLES and line.share < NEARLY_ALL):
        return None

    return line if all(map(line.is_function_of, of_slow)) else None
