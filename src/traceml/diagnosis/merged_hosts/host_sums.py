"""Exact sums of the steps of a host's ranks. The center, which has the rows of few of them, adds these up."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, Self

import msgpack
import msgspec
import numpy as np
from msgspec.structs import replace

from traceml.database.schema import DEVICE_STEPS, NAMES, STEPS, TABLES, USER_PHASES, Table
from traceml.database.store.reader import StoreReader
from traceml.database.store.records import names_of, rows_of
from traceml.database.store.summaries import STEP_TABLES, StepSums, TableSums, sum_rows
from traceml.diagnosis.facts.run_time import SET_UP_STEPS

__all__ = ["HOST_SUMS", "HostSums"]

HOST_SUMS = "host_sums"
"""Kind of the event of a run with the sums of a host: the newest one counts."""
_NAMES = tuple(table.name for table in STEP_TABLES)


class HostSums(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Sums of all steps of some ranks."""

    ranks: tuple[int, ...]
    steps: StepSums  # the sums of all steps of the ranks; the groups of user phases are those of `names`
    set_up: StepSums  # the same of their first steps, which include set-up: reports leave them out
    names: Mapping[int, str]  # names of user phases by id

    @classmethod
    def read(cls, reader: StoreReader, ranks: Mapping[int, int]) -> Self:
        """Return the sums of streams of a store."""
        names = _Names(reader, ranks)
        whole = [names.unified(stream, sums) for stream, sums in reader.step_sums().items() if stream in ranks]
        begin = min((int(each.steps.bins["first_step"].min()) for each in whole if each.count), default=0)
        first = {
            table.name: _first_sums(reader, table, ranks, begin)
            for table in (STEPS, DEVICE_STEPS, USER_PHASES)
            if table.name in reader.tables
        }
        set_up = [names.unified(stream, sums) for stream, sums in StepSums.by_stream(first).items()]
        nothing = StepSums.of({})
        return cls(
            ranks=tuple(sorted(ranks.values())),
            steps=nothing.join(*whole),
            set_up=nothing.join(*set_up),
            names=names.by_id,
        )

    def to_row(self) -> list[Any]:
        """Return the sums as plain data, without bytes: events are also written as JSON."""
        return [list(self.ranks), *map(_packed, (self.steps, self.set_up)), [list(each) for each in self.names.items()]]

    @classmethod
    def from_row(cls, row: Any) -> Self:
        """Reverse `to_row`.

        Raises:
            ValueError: it is not such a row.
        """
        try:
            ranks, steps, set_up, names = row
            return cls(
                ranks=tuple(map(int, ranks)),
                steps=_unpacked(steps),
                set_up=_unpacked(set_up),
                names={int(number): str(name) for number, name in names},
            )
        except (TypeError, ValueError, AttributeError, msgpack.UnpackException) as error:
            raise ValueError(f"the sums of a host cannot be read: {error}") from error


class _Names:
    """Names of user phases with one id for all ranks: each process numbers them by itself."""

    def __init__(self, reader: StoreReader, streams: Mapping[int, int]) -> None:
        self.by_id: dict[int, str] = {}
        self._ids: dict[str, int] = {}
        self._of: dict[int, dict[int, int]] = {}
        if NAMES.name in reader.tables:
            for frame in reader.frames(NAMES.name):
                if frame.stream in streams:
                    for number, name in names_of(frame.maps()):
                        self._add(frame.stream, number, name)

    def unified(self, stream: int, sums: StepSums) -> StepSums:
        """Return sums of a stream in which user phases have these ids; unnamed ones are left out."""
        unified, user = self._of.get(stream, {}), sums.user_phases
        ids = np.array([unified.get(number, -1) for number in user.bins["group"].tolist()], np.int64)
        bins = user.bins[ids >= 0].copy()
        bins["group"] = ids[ids >= 0]
        order = np.lexsort((bins["group"], bins["bin"]))
        return replace(sums, user_phases=replace(user, bins=bins[order]))

    def _add(self, stream: int, number: int, name: str) -> None:
        known = self._ids.setdefault(name, len(self._ids))
        self.by_id[known] = name
        self._of.setdefault(stream, {})[number] = known


def _first_sums(reader: StoreReader, table: Table, streams: Mapping[int, int], begin: int) -> dict[int, TableSums]:
    end = begin + SET_UP_STEPS
    frames = list(reader.step_frames(table.name, [(begin, end - 1)], set(streams)))
    if not frames:
        return {}

    rows, of_row = rows_of(frames, table.dtype)
    first = rows["step"] < end
    return sum_rows(table.name, rows[first], of_row[first])


def _packed(sums: StepSums) -> dict[str, str]:
    tables = {name: getattr(sums, name) for name in _NAMES}
    return {name: base64.b85encode(each.encoded()).decode() for name, each in tables.items() if len(each.bins)}


def _unpacked(packed: Any) -> StepSums:
    return StepSums.of({
        name: TableSums.decoded(name, base64.b85decode(text)) for name, text in packed.items() if name in TABLES
    })  # fmt: skip
