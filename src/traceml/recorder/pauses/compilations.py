"""Compilations by torch.compile, as dynamo records them; reading the records costs the training nothing."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from traceml.database.schema import Compiled
from traceml.inspection.user_files import display_path

__all__ = ["Compilation", "CompilationReader"]

_MAX_GUARD = 120
_MAX_FRAMES = 1024
_COMMENT = re.compile(r"\s+#.*", re.DOTALL)
_NUMBER = re.compile(r"^\d+/\d+:\s*")


class Compilation(NamedTuple):
    """A compilation."""

    end_us: int  # its end, microseconds since 1970
    ns: int
    detail: Compiled  # why it was compiled
    place: str  # the function, `FILE:LINE FUNCTION`; empty if unknown
    guard: str  # the guard of the code compiled before that failed; empty for the first compilation


class CompilationReader:
    """Reads what dynamo has recorded since the last call; it keeps the newest 64."""

    def __init__(self, modules: Any = None) -> None:
        self._modules = sys.modules if modules is None else modules
        self._last: Any = None
        self._places: dict[str, str] = {}  # by number of the function
        self._recompiled: set[str] = set()  # numbers of compilations that were not the first of their function

    def drain(self) -> list[Compilation]:
        """Return the compilations since the last call."""
        dynamo = self._modules.get("torch._dynamo.utils")
        records = getattr(dynamo, "_compilation_metrics", None)
        if not records or records[-1] is self._last:
            return []

        new = list(self._since(list(records)))
        self._last = records[-1]
        return [found for record in new if (found := self._read(record)) is not None]

    def _since(self, records: Sequence[Any]) -> Iterator[Any]:
        at = next((at for at, record in enumerate(records) if record is self._last), -1)
        yield from records[at + 1 :]

    def _read(self, record: Any) -> Compilation | None:
        began_us, took_us = getattr(record, "start_time_us", None), getattr(record, "duration_us", None)
        if took_us is None:
            took_us = int(1e6 * (getattr(record, "entire_frame_compile_time_s", None) or 0.0))

        if not began_us:
            return None

        number = str(getattr(record, "compile_id", "") or "")
        self._learn(record, number)
        guard = _guard(getattr(record, "recompile_reason", None))
        place = self._places.get(number.partition("/")[0], "")
        return Compilation(began_us + took_us, 1000 * took_us, self._detail(record, number, guard), place, guard)

    def _learn(self, record: Any, number: str) -> None:
        """Remember the function of a number; records of its backward pass do not name it."""
        name = getattr(record, "co_name", None)
        if name and len(self._places) < _MAX_FRAMES:
            file = display_path(str(record.co_filename))
            self._places[number.partition("/")[0]] = f"{file}:{record.co_firstlineno} {name}"

    def _detail(self, record: Any, number: str, guard: str) -> Compiled:
        if "recompile limit" in str(getattr(record, "fail_reason", None) or ""):
            return Compiled.LIMIT

        if number in self._recompiled:
            return Compiled.BACKWARD

        if guard and len(self._recompiled) < _MAX_FRAMES:
            self._recompiled.add(number)

        return Compiled.AGAIN if guard else Compiled.FIRST


def _guard(reason: str | None) -> str:
    """Return the condition of dynamo's reason, `0/1: x.size()[0] == 4   # comment...`, in one short line."""
    first = _COMMENT.sub("", _NUMBER.sub("", reason or ""))
    return " ".join(first.split())[:_MAX_GUARD]
