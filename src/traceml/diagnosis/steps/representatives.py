"""Representatives: ranks whose rows are sent in place of other ranks' of their host, where hosts are merged."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, Self

import msgspec
import numpy as np

from traceml.diagnosis.steps.aligned_steps import Ints
from traceml.diagnosis.steps.step_split import Floats

__all__ = ["HOST_CHOICE", "ExcessWork", "HostChoice", "Representatives", "packed_ms"]

HOST_CHOICE = "host_choice"
"""Kind of the event of a run by which a host chooses other ranks than before."""
_NS_PER_MS = np.float32(1e6)  # milliseconds in half precision reach to a minute, accurate to 0.05 %
_PACKED_MS = np.dtype("<f2")
_STEP_LIMIT = 2**62
_SLOTS = 128
_MAX_WAITING = 4096  # where no verdict reads them


class HostChoice(msgspec.Struct, frozen=True, kw_only=True, eq=False, dict=True):
    """The ranks of a host whose rows are sent on."""

    host: str  # unique key of the host
    typical: int  # the rank that represents the ordinary ones
    ordinary: tuple[int, ...]  # the ranks that it represents, itself among them
    sent: tuple[int, ...]  # ranks whose rows are sent: the typical one, outliers, and those that were asked for
    ended: tuple[int, ...] = ()  # ranks that have ended
    ended_at: tuple[int, ...] = ()  # the last step of each rank in `ended`, -1 without any

    @cached_property
    def alive(self) -> frozenset[int]:
        """The ranks of the host that have not ended before the others."""
        return frozenset((*self.ordinary, *self.sent))

    @property
    def ranks(self) -> frozenset[int]:
        """The ranks of the host."""
        return self.alive.union(self.ended)

    @cached_property
    def size(self) -> int:
        """Ranks up to the highest one of the host."""
        return 1 + max((self.typical, *self.ranks))

    @cached_property
    def represents(self) -> tuple[int, ...]:
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
        return [self.host, self.typical, *map(list, (self.ordinary, self.sent, self.ended, self.ended_at))]

    @classmethod
    def from_row(cls, row: Any) -> Self:
        """Reverse `to_row`.

        Raises:
            ValueError: it is not such a row.
        """
        try:
            host, typical, *ranks = row
            ordinary, sent, ended, ended_at = (tuple(map(int, each)) for each in ranks)
            return cls(
                host=str(host), typical=int(typical), ordinary=ordinary, sent=sent, ended=ended, ended_at=ended_at
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"the choice of a host cannot be read: {error}") from error


class ExcessWork(msgspec.Struct, frozen=True):
    """Own work of the longest of a host's ordinary ranks beyond that of the typical one, for consecutive steps."""

    first_step: int = 0  # step of the first value
    packed: bytes = b""  # the values, as `packed_ms` gives them

    def __len__(self) -> int:
        return len(self.packed) // _PACKED_MS.itemsize

    def to_row(self) -> list[Any]:
        """Return it as plain data."""
        return [self.first_step, self.packed]

    @classmethod
    def from_row(cls, row: Any) -> Self:
        """Reverse `to_row`.

        Raises:
            ValueError: it is not such a row.
        """
        if type(row) is list and len(row) == 2:
            first_step, packed = row
            if type(first_step) is int and 0 <= first_step < _STEP_LIMIT and type(packed) is bytes:
                return cls(first_step, packed[: len(packed) // 2 * 2])

        raise ValueError("the own work beyond the typical rank's cannot be read")


def packed_ms(values_ns: Floats) -> bytes:
    """Return durations as milliseconds in half precision; NaN if a rank has no such step."""
    return bytes((values_ns / _NS_PER_MS).astype(_PACKED_MS).tobytes())


class _Chosen(msgspec.Struct, frozen=True):
    """The newest choices of all hosts as arrays."""

    size: int  # ranks up to the highest one
    at: Mapping[int, int]  # typical rank -> index of its host
    unsent: Ints  # ranks whose rows are not sent
    typical: Ints  # of each of these, the rank that represents it
    ended: Ints
    ended_at: Ints

    @classmethod
    def of(cls, choices: Sequence[HostChoice]) -> Self:
        typical = np.array([choice.typical for choice in choices], np.int64)
        unsent = [choice.unsent for choice in choices]
        ended = [each for choice in choices for each in zip(choice.ended, choice.ended_at, strict=False)]
        return cls(
            max((choice.size for choice in choices), default=0),
            {choice.typical: at for at, choice in enumerate(choices)},
            np.array([*chain.from_iterable(unsent)], np.int64),
            typical.repeat([len(ranks) for ranks in unsent]),
            *np.array(ended, np.int64).reshape(-1, 2).T,
        )


class Representatives:
    """The newest choice of each host, and the work of the ranks that others represent.

    It is false as long as no host is merged.
    """

    def __init__(self) -> None:
        self._at: dict[str, int] = {}
        self.choices: list[HostChoice] = []  # the newest choice of each host
        self._silent: set[str] = set()
        self._above = np.zeros((0, _SLOTS), np.float32)
        self._steps = np.full((0, _SLOTS), -1, np.int64)
        self._waiting: list[tuple[int, ExcessWork]] = []
        self._chosen: _Chosen | None = None

    def __bool__(self) -> bool:
        return bool(self.choices)

    @property
    def unsent(self) -> Ints:
        """Ranks whose rows are not sent now."""
        return self._newest.unsent

    @property
    def silent(self) -> Ints:
        """Ranks of hosts that cannot be reached."""
        hosts = [choice for choice in map(self.choice_of, self._silent) if choice is not None]
        return np.array(sorted(rank for choice in hosts for rank in choice.ranks), np.int64)

    def choice_of(self, host: str) -> HostChoice | None:
        """Return the newest choice of a host."""
        at = self._at.get(host)
        return None if at is None else self.choices[at]

    def take(self, choice: HostChoice) -> bool:
        """Take a choice; return whether other ranks are chosen than before."""
        at, before = self._at.get(choice.host), self.choice_of(choice.host)
        if at is None:
            at = self._at[choice.host] = len(self.choices)
            self.choices.append(choice)
            self._grow(at + 1)

        self._silent.discard(choice.host)
        is_same = choice.is_same(before)
        if before is not None and is_same and choice.ended_at == before.ended_at:
            return False  # the earlier one stays, with what was derived from it

        self.choices[at] = choice
        self._chosen = None
        if before is not None and choice.typical != before.typical:
            self._waiting = [each for each in self._waiting if each[0] != at]
            self._steps[at] = -1

        return not is_same

    def add(self, host: str, above: ExcessWork) -> None:
        """Add the work beyond that of a host's typical rank; without a choice of the host it is ignored."""
        at = self._at.get(host)
        if at is not None and len(above):
            self._waiting.append((at, above))
            if len(self._waiting) > _MAX_WAITING:
                self._scatter()

    def mark_unreachable(self, host: str) -> None:
        """Record that a host cannot be reached, until its next choice."""
        self._silent.add(host)

    def represents(self, ranks: Sequence[int]) -> dict[int, tuple[int, ...]]:
        """Return the ranks that each of these ranks represents."""
        at = self._newest.at
        return {rank: self.choices[at[rank]].represents for rank in ranks if rank in at}

    def above(self, ranks: Sequence[int], steps: Ints) -> Floats:
        """Return how much longer the own work of the longest represented rank is, rank x step; 0 if unknown."""
        self._scatter()
        hosts = self._newest.at
        rows = [row for row, rank in enumerate(ranks) if rank in hosts]
        above = np.zeros((len(ranks), len(steps)), np.float32)
        at = np.ix_(np.array([hosts[ranks[row]] for row in rows], np.intp), steps % _SLOTS)
        known = (self._steps[at] == steps) & ~np.isnan(self._above[at])
        above[rows] = np.where(known, self._above[at], np.float32(0))
        return above

    def reached(self, latest: Ints, missing: Collection[int] = ()) -> Ints:
        """Return the last step of each rank; a rank without rows of its own has that of its representative.

        Args:
            latest: last step of each rank by its own rows, -1 without any.
            missing: ranks that are not compared, nor are the ranks that they represent.
        """
        chosen = self._newest
        reached = np.full(max(chosen.size, len(latest)), -1, np.int64)
        reached[: len(latest)] = latest
        known = reached.copy()
        known[[rank for rank in missing if rank < len(known)]] = -1
        reached[chosen.unsent] = known[chosen.typical]
        reached[chosen.ended] = np.maximum(chosen.ended_at, reached[chosen.ended])
        return reached

    @property
    def _newest(self) -> _Chosen:
        if self._chosen is None:
            self._chosen = _Chosen.of(self.choices)

        return self._chosen

    def _scatter(self) -> None:
        """Put the added work into the rings, that of all hosts at once."""
        if not self._waiting:
            return

        counts = np.array([len(above) for _, above in self._waiting])
        at = np.repeat([at for at, _ in self._waiting], counts)
        firsts = np.repeat([above.first_step for _, above in self._waiting], counts)
        steps = firsts + np.arange(len(firsts)) - np.repeat(np.cumsum(counts) - counts, counts)
        packed = np.frombuffer(b"".join(above.packed for _, above in self._waiting), _PACKED_MS)
        # Of a repeated index the last value stays, which is that of the newest step.
        self._above[at, steps % _SLOTS] = packed.astype(np.float32) * _NS_PER_MS
        self._steps[at, steps % _SLOTS] = steps
        self._waiting.clear()

    def _grow(self, hosts: int) -> None:
        if hosts > len(self._above):
            more = max(hosts, 2 * len(self._above)) - len(self._above)
            self._above = np.concatenate([self._above, np.zeros((more, _SLOTS), np.float32)])
            self._steps = np.concatenate([self._steps, np.full((more, _SLOTS), -1, np.int64)])
