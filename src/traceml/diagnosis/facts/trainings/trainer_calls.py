"""Lines that only call a library's trainer (`trainer.train()`, `model.learn()`): all phases are in them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from traceml.database.schema import Phase
from traceml.diagnosis.facts.blamed_lines import BlamedLine, blamed_line
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.facts.sampled_shares import NAMED_SHARE

__all__ = ["calls_trainer", "own_line"]

_MIN_SAMPLES = 3
_OWN_SHARE = 0.1  # of a line's samples without a library's function: it does something itself
_FORWARD, _BACKWARD, _OPTIMIZER = (phase.label for phase in (Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER))


def own_line(
    lines: Sequence[SampledLine], part: str, phase_share: float, ranks: Collection[int] = ()
) -> BlamedLine | None:
    """Return `blamed_line` of the same arguments, where it is more than the call of a trainer."""
    line = blamed_line(lines, part, phase_share, ranks)
    return None if line is None or calls_trainer(lines, line) else line


def calls_trainer(lines: Sequence[SampledLine], line: BlamedLine) -> bool:
    """Return whether backward passes and optimizer run in the very same line, in a library: no loop of the user's.

    The forward passes stand for an optimizer that the hooks do not know, or that was seen too seldom.
    """
    seen = [each for each in lines if (each.file, each.line) == (line.file, line.line)]
    itself = sum(each.samples for each in seen if each.library is None)
    if itself > _OWN_SHARE * sum(each.samples for each in seen):
        return False

    if not _has_most(lines, _BACKWARD, line) or not _has_most(lines, _OPTIMIZER, line, fewest=0):
        return False

    return _has_most(lines, _OPTIMIZER, line) or _has_most(lines, _FORWARD, line)


def _has_most(lines: Sequence[SampledLine], phase: str, line: BlamedLine, fewest: int = _MIN_SAMPLES) -> bool:
    seen = [each for each in lines if each.part == phase]
    same = sum(each.samples for each in seen if (each.file, each.line) == (line.file, line.line))
    total = sum(each.samples for each in seen)
    return total >= fewest and same >= NAMED_SHARE * total
