"""Watch over the rank's memory: when it grows for a long time, the containers of the script are read twice.

Memory may grow by a megabyte in a second or in a minute, in each step or in each epoch. So the readings of memory get
rarer until they cover growth that counts, and the second reading of the containers waits until memory has grown again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from traceml.clock import monotonic_ns
from traceml.clock import own_time as time
from traceml.database.info_kinds import InfoKind, InfoSender
from traceml.database.schema import Slot
from traceml.inspection.thread_frames import thread_frame
from traceml.inspection.user_files import display_path
from traceml.samplers.procfs import ProcFile
from traceml.samplers.torch_memory import initialized_cuda

if TYPE_CHECKING:
    from traceml.recorder.growth.reachable_objects import ReachableObjects

__all__ = ["GrowthWatch"]

INTERVAL_NS = 5 * 10**8
"""Time between two readings of memory at first; while it does not grow enough, it doubles again and again."""
_EARLY_NS = 10**8
"""A reading may come so much earlier: cycles are half a second apart, and the one just before would be left out."""
BETWEEN_NS = 2 * 10**9
"""Time between two readings of the containers, at least; they are at least 10 steps apart, too."""
MIN_GROWN_BYTES = 16 << 20
"""Growth over the kept readings from which on containers are read."""
GROWN_AGAIN_BYTES = 16 << 20
"""Growth after the first reading of the containers, before the second one: less may be another object's."""
MAX_COMPARISONS = 6
_MIN_STEPS = 10
_READINGS = 12
_FIRST_PAUSE_NS = 20 * 10**9
_LONG_CHAIN, _STEADY_SHARE = 30, 0.9
_REPORTED = 5  # growing containers that are reported
_MANY = 3  # from here on those in one container are reported together
_INDICES = re.compile(r"(\[[^\]]*\])+$")


class _First(NamedTuple):
    """The first reading of the containers, to be compared with a later one."""

    at_ns: int
    step: int
    used_bytes: int
    cost_ns: int
    containers: dict[tuple[str, int], ReachableObjects]


class _Change(NamedTuple):
    """A container that has grown, and the elements that it had before."""

    before: int
    held: ReachableObjects

    @property
    def gained_bytes(self) -> int:
        """Bytes of the elements that it has gained."""
        return (self.held.size - self.before) * self.held.item_bytes


class GrowthWatch:
    """Called in each cycle of the recorder's thread.

    Args:
        thread: returns the id of the training thread.
        note: appends a row to `info`.
        now: returns a monotonic time in nanoseconds.
    """

    def __init__(
        self,
        slots: Any,
        thread: Callable[[], int],
        is_user: Callable[[FrameType], bool],
        note: InfoSender,
        now: Callable[[], int] = monotonic_ns,
    ) -> None:
        self._slots, self._thread, self._is_user, self._note = slots, thread, is_user, note
        self._now = now
        self._statm = ProcFile("/proc/self/statm", 128)
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")
        self._readings: list[int] = []
        self._due_ns, self._interval_ns = 0, INTERVAL_NS
        self._first: _First | None = None
        self._comparisons = 0
        self._pause_ns = _FIRST_PAUSE_NS

    def __call__(self, last: bool) -> None:
        """Read memory, and the containers when it has grown."""
        now, step = self._now(), self._slots[Slot.STEP]
        if last:
            self._statm.close()
            return

        if now + _EARLY_NS < self._due_ns or step < _MIN_STEPS or self._comparisons >= MAX_COMPARISONS:
            return

        used_bytes = self._read_bytes()
        if self._first is not None:
            self._due_ns = now + INTERVAL_NS
            if self._is_later(now, step, used_bytes, self._first):
                self._compare(now, step, self._first)

            return

        self._take(used_bytes)
        self._due_ns = now + self._interval_ns
        if _grows(self._readings):
            began = time.thread_time_ns()
            containers = self._read_containers()
            self._first = _First(now, step, used_bytes, time.thread_time_ns() - began, containers)

    def _take(self, used_bytes: int) -> None:
        self._readings.append(used_bytes)
        if len(self._readings) == 2 * _READINGS:
            self._readings = [min(pair) for pair in zip(self._readings[::2], self._readings[1::2], strict=True)]
            self._interval_ns *= 2

    @staticmethod
    def _is_later(now: int, step: int, used_bytes: int, first: _First) -> bool:
        """Return whether enough has happened since the first reading to see in the containers what grows."""
        grown = used_bytes - first.used_bytes
        return now - first.at_ns >= BETWEEN_NS and step - first.step >= _MIN_STEPS and grown >= GROWN_AGAIN_BYTES

    def _read_containers(self) -> dict[tuple[str, int], ReachableObjects]:
        from traceml.recorder.growth.reachable_objects import read_containers  # a healthy rank does not pay for it

        return read_containers(thread_frame(self._thread()), self._is_user)

    def _compare(self, now: int, step: int, first: _First) -> None:
        began = time.thread_time_ns()
        steps = step - first.step
        pairs = _pairs(first.containers, self._read_containers())
        changes = [_Change(before.size, held) for before, held in pairs if _has_grown(before, held, steps)]
        joined = sorted(_joined(changes), key=lambda each: (not each.held.holds_graph, -each.gained_bytes))
        # Their lines are searched for in whole files.
        grown = [_described(each.held, each.before, steps) for each in joined[:_REPORTED]]
        cost_ns = first.cost_ns + time.thread_time_ns() - began
        self._note(InfoKind.GROWTH, step=step, steps=steps, cost_ms=round(cost_ns / 1e6, 3), grown=grown)
        self._first, self._readings, self._interval_ns = None, [], INTERVAL_NS
        self._comparisons += 1
        # A rise of copies is uneven: that they are kept is what proves it, so that is looked at again soon.
        if self._comparisons == 1 and any(each.held.is_copied for each in joined):
            self._due_ns = now + BETWEEN_NS
        else:
            self._due_ns, self._pause_ns = now + self._pause_ns, 2 * self._pause_ns

    def _read_bytes(self) -> int:
        """Return resident memory, and what torch has allocated on devices."""
        resident = int(self._statm.read().split(None, 2)[1]) * self._page_bytes
        cuda = initialized_cuda()
        if cuda is None:
            return resident

        return resident + sum(int(cuda.memory_allocated(device)) for device in range(cuda.device_count()))


def _grows(readings: list[int]) -> bool:
    """Return whether the lowest reading of each third is above that of the one before."""
    if len(readings) < _READINGS // 2:
        return False

    third = len(readings) // 3
    first, second, last = (min(readings[at : at + third]) for at in (0, third, len(readings) - third))
    return first < second < last and last - first >= MIN_GROWN_BYTES


def _pairs(
    before: Mapping[tuple[str, int], ReachableObjects], after: Mapping[tuple[str, int], ReachableObjects]
) -> Iterator[tuple[ReachableObjects, ReachableObjects]]:
    """Yield each container as it was and as it is; one that is new by the path of another was copied.

    A copy may be where another container was: the path shows whether there was one by it.
    """
    known = {(held.path, held.file): held for held in before.values()}
    for key, held in after.items():
        same, last = before.get(key), known.get((held.path, held.file))
        if same is not None and (last is None or same.path == held.path):
            yield same, held
        elif last is not None and not held.is_copied:
            yield last, held._replace(is_copied=True)


def _has_grown(before: ReachableObjects, after: ReachableObjects, steps: int) -> bool:
    from traceml.recorder.growth.reachable_objects import MAX_CHAIN

    if (before.kind, before.item) != (after.kind, after.item):  # another object at the same address
        return False

    if after.kind != "graph":
        return after.size > before.size

    # The graph of one step may be longer than that of another; that of all steps gets longer with each.
    is_long = before.size >= max(_LONG_CHAIN, steps)
    return after.size >= MAX_CHAIN or (is_long and after.size - before.size >= _STEADY_SHARE * steps)


def _joined(changes: Iterable[_Change]) -> Iterator[_Change]:
    """Yield what has grown; many containers in one, as a list for the outputs of each layer, as one."""
    groups: dict[tuple[str, ...], list[_Change]] = {}
    for each in changes:
        held = each.held
        holder = "" if held.is_copied or held.kind == "graph" else _holder(held.path)
        of_many = (held.file, held.function, held.kind, holder) if holder else (held.file, held.function, held.path)
        groups.setdefault(of_many, []).append(each)

    for group in groups.values():
        yield from group if len(group) < _MANY else [_as_one(group)]


def _holder(path: str) -> str:
    """Return the container of a path such as `outputs['layer1']`: `outputs`; of another path nothing."""
    return _INDICES.sub("", path) if path.endswith("]") else ""


def _as_one(group: Sequence[_Change]) -> _Change:
    """Return containers as one, whose elements have their mean size."""
    gained = sum(each.held.size - each.before for each in group)
    largest = max(group, key=lambda each: each.held.item_bytes).held
    return _Change(
        sum(each.before for each in group),
        largest._replace(
            path=f"{_holder(largest.path)}[...]",
            size=sum(each.held.size for each in group),
            item_bytes=sum(each.gained_bytes for each in group) // gained,
            holds_graph=any(each.held.holds_graph for each in group),
            of_dataset=all(each.held.of_dataset for each in group),
            max_size=sum(each.held.max_size for each in group) if all(each.held.max_size for each in group) else 0,
        ),
    )


def _described(held: ReachableObjects, before: int, steps: int) -> dict[str, Any]:
    from traceml.recorder.growth.growing_lines import appending_line

    facts = held._asdict()
    facts["count"] = facts.pop("size")
    line = appending_line(held.file, held.path, held.kind, is_copied=held.is_copied)
    facts["file"] = display_path(held.file)
    where = {} if line is None else {"line": line[0], "function": line[1]}
    return facts | {"per_step": round((held.size - before) / steps, 4), **where}
