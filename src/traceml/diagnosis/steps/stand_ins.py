"""Stand-ins: ranks whose rows stand for those of other ranks of their host, where hosts are merged."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from traceml.diagnosis.steps.step_split import Floats

__all__ = ["HOST_CHOICE", "HostChoice", "StandIns", "packed_ms", "unpacked_ns"]

HOST_CHOICE = "host_choice"
"""Kind of the event of a run by which a host chooses other ranks than before."""
_NS_PER_MS = np.float32(1e6)  # milliseconds in half precision reach to a minute, accurate to 0.05 %
_SLOTS = 128
_FACTS = ("host", "typical", "ordinary", "sent", "ended", "ended_at")

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class HostChoice:
    """The ranks of a host whose rows are sent on.

    Attributes:
        host: unique key of the host.
        typical: the rank that stands for the ordinary ones.
        ordinary: the ranks that it stands for, itself among them.
        sent: ranks whose rows are sent: the typical one, outliers, and those that were asked for.
        ended: ranks that have ended.
        ended_at: the last step of each of these, -1 without any.
        first_step: step of the first value of `above_ns`.
        above_ns: by step, own work of the longest of the ordinary ranks beyond that of the typical one; NaN where a
            rank has no such step.
    """

    host: str
    typical: int
    ordinary: tuple[int, ...]
    sent: tuple[int, ...]
    ended: tuple[int, ...] = ()
    ended_at: tuple[int, ...] = ()
    first_step: int = 0
    above_ns: Floats = field(default_factory=lambda: np.empty(0, np.float32))

    @cached_property
    def alive(self) -> frozenset[int]:
        """The ranks of the host that have not ended before the others."""
        return frozenset((*self.ordinary, *self.sent))

    @property
    def ranks(self) -> frozenset[int]:
        """The ranks of the host."""
        return self.alive.union(self.ended)

    @cached_property
    def stands_for(self) -> tuple[int, ...]:
        """The ordinary ranks without those that have rows of their own."""
        return tuple(rank for rank in self.ordinary if rank == self.typical or rank not in self.sent)

    @cached_property
    def unsent(self) -> list[int]:
        """The ordinary ranks without rows of their own."""
        return [rank for rank in self.ordinary if rank not in self.sent]

    def is_same(self, other: HostChoice | None) -> bool:
        """Return whether the same ranks are chosen."""
        mine = self.typical, self.ordinary, self.sent, self.ended
        return other is not None and mine == (other.typical, other.ordinary, other.sent, other.ended)

    def to_row(self) -> list[Any]:
        """Return the choice as plain data."""
        chosen = [list(ranks) for ranks in (self.ordinary, self.sent, self.ended, self.ended_at)]
        return [self.host, self.typical, *chosen, self.first_step, packed_ms(self.above_ns)]

    def to_facts(self) -> dict[str, Any]:
        """Return the chosen ranks, as the event of a run has them."""
        values = {name: getattr(self, name) for name in _FACTS}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Self:
        """Reverse `to_facts`.

        Raises:
            ValueError: it is none.
        """
        return cls.from_row([*(facts.get(name) for name in _FACTS), 0, b""])

    @classmethod
    def from_row(cls, row: Any) -> Self:
        """Reverse `to_row`.

        Raises:
            ValueError: it is none.
        """
        try:
            host, typical, ordinary, sent, ended, ended_at, first_step, above = row
            return cls(
                host=str(host),
                typical=int(typical),
                ordinary=tuple(map(int, ordinary)),
                sent=tuple(map(int, sent)),
                ended=tuple(map(int, ended)),
                ended_at=tuple(map(int, ended_at)),
                first_step=int(first_step),
                above_ns=unpacked_ns(above),
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"the choice of a host cannot be read: {error}") from error


def packed_ms(values_ns: Floats) -> bytes:
    """Return durations as milliseconds in half precision."""
    return bytes((values_ns / _NS_PER_MS).astype("<f2").tobytes())


def unpacked_ns(data: bytes) -> Floats:
    """Reverse `packed_ms`.

    Raises:
        ValueError, TypeError: it is none.
    """
    return np.asarray(np.frombuffer(data, "<f2").astype(np.float32) * _NS_PER_MS)


class StandIns:
    """The newest choice of each host, and the work of the ranks that others stand for.

    It is false as long as no host is merged.
    """

    def __init__(self) -> None:
        self._at: dict[str, int] = {}
        self._choices: list[HostChoice] = []
        self._silent: set[str] = set()
        self._above = np.zeros((0, _SLOTS), np.float32)
        self._steps = np.full((0, _SLOTS), -1, np.int64)
        self._unsent: Ints | None = None

    def __bool__(self) -> bool:
        return bool(self._choices)

    @property
    def choices(self) -> Sequence[HostChoice]:
        """The newest choice of each host."""
        return self._choices

    @property
    def unsent(self) -> Ints:
        """Ranks whose rows are not sent now."""
        if self._unsent is None:
            self._unsent = np.array([rank for choice in self._choices for rank in choice.unsent], np.int64)

        return self._unsent

    @property
    def silent(self) -> Ints:
        """Ranks of hosts that cannot be reached."""
        hosts = [choice for choice in self._choices if choice.host in self._silent]
        return np.array(sorted(rank for choice in hosts for rank in choice.ranks), np.int64)

    def choice_of(self, host: str) -> HostChoice | None:
        """Return the newest choice of a host."""
        at = self._at.get(host)
        return None if at is None else self._choices[at]

    def take(self, choice: HostChoice) -> bool:
        """Take a choice; return whether other ranks are chosen than before."""
        at, before = self._at.get(choice.host), self.choice_of(choice.host)
        if at is None:
            at = self._at[choice.host] = len(self._choices)
            self._choices.append(choice)
            self._grow(at + 1)

        self._choices[at] = choice
        self._silent.discard(choice.host)
        if before is None or choice.typical != before.typical:
            self._steps[at] = -1

        steps = np.arange(choice.first_step, choice.first_step + len(choice.above_ns))[-_SLOTS:]
        self._above[at, steps % _SLOTS], self._steps[at, steps % _SLOTS] = choice.above_ns[-_SLOTS:], steps
        changed = not choice.is_same(before)
        if changed:
            self._unsent = None

        return changed

    def silence(self, host: str) -> None:
        """Record that a host cannot be reached, until its next choice."""
        self._silent.add(host)

    def stands_for(self, ranks: Sequence[int]) -> dict[int, tuple[int, ...]]:
        """Return the ranks that some of these ranks stand for."""
        typical = {choice.typical: choice for choice in self._choices}
        return {rank: typical[rank].stands_for for rank in ranks if rank in typical}

    def above(self, ranks: Sequence[int], steps: Ints) -> Floats:
        """Return own work of the longest of those that a rank stands for beyond its own, rank x step; 0 if unknown."""
        typical = {choice.typical: at for at, choice in enumerate(self._choices)}
        rows = [row for row, rank in enumerate(ranks) if rank in typical]
        above = np.zeros((len(ranks), len(steps)), np.float32)
        at = np.ix_(np.array([typical[ranks[row]] for row in rows], np.intp), steps % _SLOTS)
        known = (self._steps[at] == steps) & ~np.isnan(self._above[at])
        above[rows] = np.where(known, self._above[at], np.float32(0))
        return above

    def reached(self, latest: Ints, missing: Collection[int] = ()) -> Ints:
        """Return the last step of each rank: of one without rows of its own that of the rank that stands for it.

        Args:
            latest: last step of each rank by its own rows, -1 without any.
            missing: ranks that are not compared: those that they stand for have no step either.
        """
        size = max((rank + 1 for choice in self._choices for rank in choice.ranks), default=0)
        reached = np.full(max(size, len(latest)), -1, np.int64)
        reached[: len(latest)] = latest
        missing = set(missing)
        for choice in self._choices:
            known = choice.typical not in missing and choice.typical < len(latest)
            reached[choice.unsent] = latest[choice.typical] if known else -1
            for rank, step in zip(choice.ended, choice.ended_at, strict=False):
                reached[rank] = max(step, reached[rank])

        return reached

    def _grow(self, hosts: int) -> None:
        if hosts > len(self._above):
            more = max(hosts, 2 * len(self._above)) - len(self._above)
            self._above = np.concatenate([self._above, np.zeros((more, _SLOTS), np.float32)])
            self._steps = np.concatenate([self._steps, np.full((more, _SLOTS), -1, np.int64)])
