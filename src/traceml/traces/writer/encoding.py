"""Encoding of events in Chrome's trace-event format, one JSON object per event."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

__all__ = [
    "NO_ARGS",
    "CounterEvent",
    "FlowEvent",
    "InstantEvent",
    "MetaEvent",
    "SpanEvent",
    "TraceEvent",
    "args_of",
    "lines",
    "quoted",
]


class TraceEvent(msgspec.Struct, gc=False, omit_defaults=True):
    """Fields of all events; `ts` is in microseconds."""

    id: int | str
    name: str
    cat: str
    pid: int
    tid: int
    ts: int | float
    ph: str


class SpanEvent(msgspec.Struct, gc=False):
    """A complete event of `dur` microseconds."""

    id: int
    name: str
    cat: str
    pid: int
    tid: int
    ts: int | float
    dur: int | float
    ph: str
    args: msgspec.Raw


class InstantEvent(TraceEvent, gc=False, kw_only=True):
    """An event without duration; `s` is its scope: t thread, p process, g global."""

    s: str
    args: msgspec.Raw


class CounterEvent(TraceEvent, gc=False, kw_only=True):
    """Values of a counter, valid until its next event."""

    args: msgspec.Raw


class FlowEvent(TraceEvent, gc=False, kw_only=True, omit_defaults=True):
    """A point of an arrow (ph s, t, f); `bp="e"` binds its end to the enclosing slice, not to the next one."""

    bp: str = ""


class MetaEvent(msgspec.Struct, gc=False):
    """The name of a process or a thread."""

    name: str
    pid: int
    tid: int
    ph: str
    args: msgspec.Raw


NO_ARGS = msgspec.Raw(b"{}")
_encoder = msgspec.json.Encoder(enc_hook=str)


def args_of(values: Mapping[str, Any]) -> msgspec.Raw:
    """Return arguments as JSON; later changes of the values are not written."""
    if not values:
        return NO_ARGS

    try:
        return msgspec.Raw(_encoder.encode(values))
    except Exception:  # noqa: BLE001 - lone surrogates, cycles, a __str__ that raises: they are written as text
        return msgspec.Raw(_encoder.encode({_clean(key): _clean(_text(value)) for key, value in values.items()}))


def quoted(text: str) -> bytes:
    """Return a text as JSON."""
    try:
        return _encoder.encode(text)
    except UnicodeEncodeError:  # a lone surrogate, as returned by os.fsdecode
        return _encoder.encode(_clean(text))


def lines(events: Sequence[Any]) -> bytes:
    """Return events as JSON, one per line."""
    try:
        return _encoder.encode_lines(events)
    except UnicodeEncodeError:  # a name with a lone surrogate, as returned by os.fsdecode
        return b"".join(_line(event) for event in events)


def _line(event: Any) -> bytes:
    try:
        return _encoder.encode(event) + b"\n"
    except UnicodeEncodeError:
        for field in ("name", "cat"):
            if hasattr(event, field):
                setattr(event, field, _clean(getattr(event, field)))

        return _encoder.encode(event) + b"\n"


def _clean(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _text(value: Any) -> str:
    try:
        return value if isinstance(value, str) else json.dumps(value)
    except Exception:  # noqa: BLE001 - see args_of
        return f"<{type(value).__name__}>"
