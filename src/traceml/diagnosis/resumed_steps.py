"""Step numbers of a training that resumes from a checkpoint: the script counts on, its restarted process from 0.

The rules judge the steps of one process. What they say names the steps as the script does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from traceml.diagnosis.findings import Finding
from traceml.formatting import count_text

__all__ = ["with_global_step_numbers"]

_NUMBERS = ("step", "last_step", "since_step", "until_step", "apart_since_step")
_IN_TEXT = re.compile(r"(?<=\bstep )\d+(?:,\d{3})*")


def with_global_step_numbers(found: Finding, before: int) -> Finding:
    """Return a finding with the step numbers of the whole training.

    Args:
        before: steps in the checkpoint from which it resumed; 0: it did not.
    """
    known = {name: found.evidence[name] for name in _NUMBERS if isinstance(found.evidence.get(name), int)}
    if not before or not known:
        return found

    shifted = {count_text(number): count_text(number + before) for number in known.values()}
    return replace(
        found,
        summary=_counted_on(found.summary, shifted, found.evidence),
        next=_counted_on(found.next, shifted, found.evidence),
        evidence={**found.evidence, **{name: number + before for name, number in known.items()}, "resumed_at": before},
    )


def _counted_on(text: str, shifted: Mapping[str, str], evidence: Mapping[str, Any]) -> str:
    """Shift the numbers that a text has of the evidence; what an exception says is the script's."""
    said = str(evidence.get("exception") or "")
    parts = text.split(said) if said else [text]
    return said.join(_IN_TEXT.sub(lambda found: shifted.get(found[0], found[0]), part) for part in parts)
