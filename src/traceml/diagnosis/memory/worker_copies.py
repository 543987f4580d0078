"""Loader workers that grow, and the objects whose pages they copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.memory_growth import GrowthEstimate
from traceml.formatting import bytes_text, count_text, plural

__all__ = ["CopiedObjects", "copied_objects", "grown_workers"]


class CopiedObjects(NamedTuple):
    """The objects that forked workers copy by reading them.

    Attributes:
        text: sentences about them.
        action: what to do.
        evidence: their attribute, type and number.
    """

    text: str
    action: str
    evidence: Mapping[str, Any]


def grown_workers(workers: int, growth: GrowthEstimate) -> str:
    """Return the growth of a loader's workers as a sentence."""
    each = bytes_text(int(60 * growth.bytes_per_s / workers))
    subject = f"Each of {workers} loader workers" if workers > 1 else "The loader worker"
    return (
        f"{subject} grows by {each} per minute: private memory grew by {bytes_text(growth.grown_bytes)} since step "
        f"{count_text(growth.since_step)}, to {bytes_text(growth.now_bytes)}."
    )


def copied_objects(facts: JobFacts, rank: int, loader: int) -> CopiedObjects | None:
    """Return the objects that the workers copy; None where their growth is not from copies, or not known to be."""
    described = facts.loader_of(rank, loader) or (facts.loader if loader == 0 else None)
    if described is None or described.start_method != "fork":
        return None

    if not facts.workers.copies(rank, loader):
        return None

    text = (
        " These are copies of memory shared since the fork: reading a Python object updates its reference count, which "
        "copies its page, until all are copied."
    )
    if not described.objects:
        return CopiedObjects(text, f"Keep what the Dataset holds {_AS_ARRAYS}", {"copies": True})

    held = described.objects[0]
    what = f" {held['path']} is a {held['type']} of {plural(held['count'], 'object')} ({held['of']})."
    evidence = {"copies": True, "attribute": held["path"], "objects": held["count"], "object_type": held["of"]}
    return CopiedObjects(f"{text}{what}", f"Keep {held['path']} {_AS_ARRAYS}", evidence)


_AS_ARRAYS = (
    "in a numpy array or a tensor (strings as one byte array with offsets) instead of Python objects: an array has "
    "one reference count for all elements, so workers keep sharing its memory."
)
