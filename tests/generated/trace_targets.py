"""Damaged traces of every form, and queries of any text."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from tests.generated.targets import DAMAGE, TEXTS, Damage, Target, refusal
from tests.traces.fabricated import FORMS, brute_force, make_events, members, read_all
from traceml.errors import TraceMLError, UsageError
from traceml.traces.native import library as native
from traceml.traces.query.conditions import parse_where
from traceml.traces.query.expressions import parse_by
from traceml.traces.query.summary import summarize

__all__ = ["TARGETS"]

_EVENTS = make_events(60, 3)
_PLAIN = make_events(60, 4, plain=True)
_SYSTRACE = b"# tracer: nop\n#\n  bash-123 (  123) [001] .... 1.000001: sched_switch: prev_comm=bash\n"
_RECORDER = {"version": "2.9", "pg_config": {"0": {}}, "entries": [{"frames": [], "state": "completed", "seq_id": 1}]}
_HTA = {
    "schemaVersion": 1,
    "distributedInfo": {"backend": "nccl", "rank": 3, "world_size": 8},
    "traceEvents": _PLAIN,
    "traceName": "/tmp/rank3.json",
}
_MEMBER = Path(__file__).parents[1] / "traces/query/data/dftracer-2.2.0.pfw.gz"


@cache
def _good(form: str) -> bytes:
    """Return a whole file of a form."""
    if form in FORMS:
        return FORMS[form](_EVENTS).encode("utf-8", "surrogatepass")

    lines = FORMS["lines"](_PLAIN).encode()
    return {
        "one gzip member": lambda: gzip.compress(lines, 6, mtime=0),
        "gzip members": lambda: members(lines, 2000),
        "dftracer": _MEMBER.read_bytes,
        "HTA": lambda: gzip.compress(json.dumps(_HTA).encode(), 6, mtime=0),
        "systrace": lambda: _SYSTRACE * 20,
        "flight recorder": lambda: json.dumps(_RECORDER).encode(),
        "bomb": lambda: gzip.compress(b'{"ph":"X","name":"' + bytes(1 << 22), 6, mtime=0),
    }[form]()


_OTHERS = ("one gzip member", "gzip members", "dftracer", "HTA", "systrace", "flight recorder", "bomb")


def _damaged(value: tuple[str, Damage, bool], folder: Path) -> None:
    """Both scanners read the same of a damaged trace, or refuse it; the summary does not fail either."""
    form, damage, is_summed_natively = value
    path = folder / "trace.json"
    path.write_bytes(damage.of(_good(form)))
    found = [_read(path, is_native=is_native) for is_native in (True, False)]
    assert found[0] == found[1]
    with _scanner(is_native=is_summed_natively):
        refusal(lambda: summarize([path], report=True, cached=False))


def _whole_lines(damage: Damage, folder: Path) -> None:
    """Events on lines that the damage did not touch are all there."""
    good = _good("lines")
    data = damage.of(good)
    path = folder / "trace.json"
    path.write_bytes(data)
    lines = Counter(data.split(b"\n")) & Counter(good.split(b"\n"))
    kept = [json.loads(line) for line, times in lines.items() for _ in range(times) if line]
    found, _ = _read(path, is_native=True)
    assert not brute_force(kept) - found


def _read(path: Path, *, is_native: bool) -> tuple[Counter[str], Any]:
    """Return the events and the damage, or no events and the words of the refusal."""
    with _scanner(is_native=is_native):
        try:
            found, reading = read_all(path)
        except TraceMLError as error:
            return Counter(), str(error)

    return found, [facts.damage for facts in reading.files]


@contextmanager
def _scanner(*, is_native: bool) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACEML_NATIVE", str(int(is_native)))
        native.library.cache_clear()
        yield

    native.library.cache_clear()


def _query(value: tuple[str, str], folder: Path) -> None:
    """Conditions and fields of any text are understood or refused with words."""
    where, by = value
    path = folder / "trace.json"
    path.write_bytes(FORMS["lines"](_PLAIN).encode())
    assert isinstance(refusal(lambda: parse_where(where)), UsageError | None)
    assert isinstance(refusal(lambda: parse_by(by)), UsageError | None)
    refusal(lambda: summarize([path], where=where, cached=False))


_WORDS = st.sampled_from(
    ["name", "dur", "ts", "args.size", "cat", "=", "!=", "<", ">=", "~", " and ", " or ", "not ", "(", ")", "'", '"',
     ",", "10ms", "1e400", "4KB", "[", "*", "read", "((((", "1/0", "-", "(a+)+$"]
)  # fmt: skip
_QUERIES = st.one_of(TEXTS, st.lists(_WORDS, max_size=8).map("".join))
TARGETS = (
    Target("trace", st.tuples(st.sampled_from([*FORMS, *_OTHERS]), DAMAGE, st.booleans()), _damaged, 60),
    Target("lines of a trace", DAMAGE, _whole_lines, 40),
    Target("query of a trace", st.tuples(_QUERIES, _QUERIES), _query, 40),
)
