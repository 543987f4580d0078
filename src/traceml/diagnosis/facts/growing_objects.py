"""Containers of the script that grew while memory did, as a rank saw them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

__all__ = ["GrowingObjects", "growing_of"]

MIN_SHARE = 0.3
"""A container explains growth if its new elements are at least this share of it."""
MIN_KEPT = 0.5
"""A container counts as never cleared if it holds at least this share of the elements that came."""


class GrowingObjects(msgspec.Struct, frozen=True, kw_only=True):
    """A container, or a tensor with its graph; see `recorder.growth.reachable_objects`."""

    path: str  # expression that reaches it; `outputs[...]` for several in one container
    file: str  # the code with the variable; the line that adds to it, where only one does
    function: str
    # its type; `graph` for a tensor, `lru_cache` for a cached function, `hooks` of a module or parameter,
    # `param_groups` of an optimizer, `figures` of pyplot
    kind: str
    count: int  # elements, or operations of the graph
    per_step: float  # how many came in a step
    item_bytes: int  # size of an element
    line: int | None = None
    steps: int = 0  # number of steps in which they were counted; 0 if unknown
    step: int = -1  # the step at which they were counted last; -1 where it is not known
    holds_graph: bool = False  # whether the elements hold the graph of their computation
    of_dataset: bool = False  # whether a data set holds it
    is_copied: bool = False  # whether a longer copy took its place
    max_size: int = 0  # elements that it holds at most; 0 for no bound

    @property
    def are_many(self) -> bool:
        """Whether it is several containers in one, such as a list for each layer: `outputs[...]`."""
        return self.path.endswith("[...]")

    @property
    def gained(self) -> int:
        """Elements that came while they were counted."""
        return round(self.per_step * self.steps)

    @property
    def bytes_per_step(self) -> float:
        """Size of the elements that came in a step."""
        return self.per_step * self.item_bytes

    def left_steps(self, latest: int) -> float:
        """Return the steps after the latest one until it is full; infinite without a bound."""
        if not self.max_size or self.per_step <= 0:
            return math.inf

        return max(self.step + (self.max_size - self.count) / self.per_step - latest, 0.0)

    def is_never_cleared(self, latest: int) -> bool:
        """Return whether it has half of what came since step 0, and was counted in the newer half of the steps."""
        return 0 <= latest <= 2 * self.step and self.count >= MIN_KEPT * self.per_step * self.step > 0

    def explains(self, bytes_per_step: float, grown_bytes: int) -> bool:
        """Return whether it explains a growth of memory; the size of a graph is not known.

        A batch is another object in each step, too, but not as large as all growth.
        """
        if self.is_copied and self.count * self.item_bytes < MIN_SHARE * grown_bytes:
            return False

        counts = self.per_step > 0 or self.kind == "graph"
        return counts and (self.holds_graph or self.bytes_per_step >= MIN_SHARE * bytes_per_step)


def growing_of(row: Mapping[str, Any]) -> tuple[GrowingObjects, ...]:
    """Return the containers of a row `growth` of the `info` log, those with graphs first; damaged ones are left out."""
    found = []
    common = {name: row[name] for name in ("steps", "step") if isinstance(row.get(name), int)}
    for each in row.get("grown") or ():
        try:
            found.append(msgspec.convert({**common, **each}, GrowingObjects))
        except (TypeError, msgspec.ValidationError):
            continue

    return tuple(found)
