"""Text that names the containers of the script that explain a growth of memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import PurePath
from typing import Any, NamedTuple

from traceml.diagnosis.facts.growing_objects import GrowingObjects
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.memory_growth import GrowthEstimate
from traceml.diagnosis.findings import known_facts
from traceml.formatting import count_text, line_text, plural

__all__ = ["GrowthCause", "growth_cause", "is_kept_in_copies"]

_OF_LIBRARIES = {
    "hooks": "Register each hook of {path} once, before the loop, or remove it by its handle (handle.remove()).",
    "param_groups": "Add parameter groups to {path} once, not in each step: it keeps the groups and their state.",
    "figures": "Close each figure after it is saved: plt.close(figure). pyplot keeps those that are not closed.",
}
_UNITS = {"DataFrame": "row", "Series": "row", "str": "character", "bytes": "byte", "bytearray": "byte"}
_TEXTS = {"str": "text", "Tensor": "tensor", "ndarray": "array"}
_MOST = 0.5  # of the growth: without a container that is so much of it, memory stops growing
_FEWEST = 10  # fewer elements give no rate: they may come in each epoch
_COUNTED = 100  # from this many elements per step on, their number is shown as a whole number


class GrowthCause(NamedTuple):
    """Containers that explain a growth of memory."""

    text: str
    action: str
    evidence: Mapping[str, Any]
    is_cache: bool  # whether a data set holds them, so that they may stop growing
    left_steps: float  # steps until the first is full, if it has a bound and is most of the growth; else infinite


def growth_cause(facts: JobFacts, rank: int, growth: GrowthEstimate) -> GrowthCause | None:
    """Return the containers that explain the growth of a rank's memory; None if none does."""
    explaining = _explaining(facts, rank, growth)
    if not explaining:
        return None

    found, *others = explaining
    evidence = known_facts(
        container=found.path,
        container_type=found.kind,
        elements=found.count,
        elements_per_step=found.per_step,
        counted_at_step=found.step if found.step >= 0 else None,
        holds_graph=found.holds_graph,
        file=found.file,
        function=found.function,
        line=found.line,
        other_containers=[each.path for each in others] or None,
    )
    is_most = found.bytes_per_step >= _MOST * growth.bytes_per_step
    return GrowthCause(
        _text(found) + "".join(_text(each, is_first=False) for each in others),
        _actions(explaining),
        evidence,
        is_cache=all(each.of_dataset and not each.holds_graph for each in explaining),
        left_steps=found.left_steps(facts.last_step) if is_most else math.inf,
    )


def is_kept_in_copies(facts: JobFacts, rank: int, growth: GrowthEstimate) -> bool:
    """Return whether a container explains growth in which copies come and go: each longer one takes its place."""
    first = _explaining(facts, rank, growth)[:1]
    return any(each.is_copied and each.is_never_cleared(facts.last_step) for each in first)


def _explaining(facts: JobFacts, rank: int, growth: GrowthEstimate) -> Sequence[GrowingObjects]:
    known = facts.growing.get(rank, ())
    alone = [each for each in known if each.explains(growth.bytes_per_step, growth.grown_bytes)]
    return alone or _together(known, growth)


def _together(known: Sequence[GrowingObjects], growth: GrowthEstimate) -> Sequence[GrowingObjects]:
    """Return the fewest containers that are most of the growth only together, as a list for each layer's outputs."""
    growing = [each for each in known if each.per_step > 0 and not each.is_copied and each.kind != "graph"]
    growing.sort(key=lambda each: -each.bytes_per_step)
    sums = accumulate(each.bytes_per_step for each in growing)
    enough = (number for number, sum_of in enumerate(sums, 1) if sum_of >= _MOST * growth.bytes_per_step)
    return growing[: next(enough, 0)]


def _where(found: GrowingObjects) -> str:
    if found.line is None:
        return f" (in {found.function}, {PurePath(found.file).name})"

    return f" (added to in {line_text(found.file, found.line, found.function)})"


def _text(found: GrowingObjects, *, is_first: bool = True) -> str:
    if found.kind == "graph":
        return (
            f" The tensor {found.path}{_where(found)} has an autograd graph, {count_text(found.count)} "
            f"operations deep{_counted_at(found)}, which grows with each step."
        )

    if not is_first:
        return f" The {_named(found)} gained {_rate(found)}, too."

    at_most = f" of at most {count_text(found.max_size)}" if found.max_size else ""
    holds = ", each of which holds the graph of its step" if found.holds_graph else ""
    had = "there were" if found.kind in _OF_LIBRARIES else "they had" if found.are_many else "it had"
    return (
        f" Meanwhile the {_named(found)} gained {_rate(found)}{holds}; "
        f"{had} {count_text(found.count)}{at_most}{_counted_at(found)}."
    )


def _named(found: GrowingObjects) -> str:
    """Return a container with its type and line: `list losses (added to in train.py:41 main)`."""
    own = found.kind in _OF_LIBRARIES
    kind = "cache of" if found.kind == "lru_cache" else f"{found.kind} of" if own else found.kind
    many = "s" if found.are_many else ""
    return f"{_TEXTS.get(kind, kind)}{many} {found.path}{_where(found)}"


def _counted_at(found: GrowingObjects) -> str:
    """Return when the elements were counted, which was before the run's end."""
    return f" at step {count_text(found.step)}" if found.step >= 0 else ""


def _rate(found: GrowingObjects) -> str:
    """Return how many elements came: in a step, or in all steps where they are too few for a rate."""
    if 0 < found.gained < _FEWEST:
        return f"{plural(found.gained, 'element')} in {plural(found.steps, 'step')}"

    whole = round(found.per_step)
    # Two readings come at other moments of their steps: one element more or less is no difference.
    is_whole = whole > 0 and found.steps > 0 and round(abs(found.per_step - whole) * found.steps) <= 1
    rate = count_text(whole) if is_whole or found.per_step >= _COUNTED else f"{found.per_step:.3g}"
    return f"{rate} {_UNITS.get(found.kind, 'element')}{'' if rate == '1' else 's'} per step"


def _actions(explaining: Sequence[GrowingObjects]) -> str:
    """Return what to do about all of them, those that hold graphs together."""
    keeping = [each for each in explaining if each.holds_graph and each.kind != "graph"]
    paths = " and ".join(each.path for each in keeping)
    first = (
        [f"Add loss.item() or loss.detach() to {paths}: the tensor itself holds all of its graph."] if keeping else []
    )
    return " ".join(first + [_action(each) for each in explaining if each not in keeping])


def _action(found: GrowingObjects) -> str:
    if found.kind == "graph":
        return (
            f"If {found.path} sums losses, add loss.item() or loss.detach(): a sum holds the graphs of all steps. "
            f"If it is a state that goes from step to step, as of an RNN, detach it there ({found.path}.detach())."
        )

    if found.kind in _OF_LIBRARIES:
        return _OF_LIBRARIES[found.kind].format(path=found.path)

    if found.max_size:
        bound = "maxsize" if found.kind == "lru_cache" else "maxlen"
        return f"Give {found.path} a {bound} that fits into memory, or keep less per step."

    if found.kind == "lru_cache":
        return f"Give the cache of {found.path} a maxsize that fits into memory."

    if found.is_copied:
        return (
            f"Keep less in {found.path}, or write it out and clear it now and then: each addition copies all of it, "
            "which takes longer each time."
        )

    bounded = "collections.deque with maxlen" if found.kind in ("list", "deque") else "functools.lru_cache with maxsize"
    return f"Clear {found.path} now and then, bound its length ({bounded}), or keep less per step."
