"""A finding's evidence as text: labels in words, numbers with their units."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from traceml.formatting import bytes_text, cores_text, count_text, factor_text, ms_text, percent_text, phase_label

__all__ = ["evidence_items"]

_LONGEST = 8  # entries of one map; the report has all
_MIN_LONG = 1e15  # a loss that diverged, in place of a count: its digits say nothing
_CORES = ("competing_processes", "started_processes", "others_cores", "busy_cores_per_rank")
_SHARES = ("share", "dominance", "fraction")
_FACTORS = ("factor", "ratio", "speedup")
_MARKS = re.compile(r"\n[ ^~]*[\^~][ ^~]*$", re.MULTILINE)  # below a line of a traceback; they fit one font only


def evidence_items(evidence: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (label, value) of a finding's numbers.

    Args:
        evidence: of the finding; units are in the names.
    """
    return [item for name, value in evidence.items() for item in _items(str(name), value)]


def _items(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if value is None:
        return

    if not isinstance(value, Mapping):
        yield _label(name), _text(name, value)
        return

    for key, each in list(value.items())[:_LONGEST]:
        if each is not None and not isinstance(each, Mapping):
            yield f"{_label(name)}: {_key_text(str(key))}", _text(name, each)


def _label(name: str) -> str:
    if name == "waiting":  # ranks
        return "waiting ranks"

    words = name.split("_")
    for unit in ("ms", "us", "s", "bytes", "pct", "ns"):
        if unit in words[1:]:
            words.remove(unit)

    return " ".join(words)


def _key_text(key: str) -> str:
    if not key:
        return "other users"  # whose processes are not named

    return f"rank {key}" if key.isdigit() else phase_label(key)


def _text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return _MARKS.sub("", value)

    if isinstance(value, bool):
        return "yes" if value else "no"

    if isinstance(value, Sequence):
        return ", ".join(_text(name, each) for each in value[:_LONGEST]) + (", ..." if len(value) > _LONGEST else "")

    return _number(name, value)


def _number(name: str, value: float) -> str:
    words = name.split("_")
    if "ms" in words:
        return ms_text(value)

    if "bytes" in words:
        return bytes_text(round(value))

    if "pct" in words:
        return percent_text(value / 100)

    if any(share in words for share in _SHARES):
        return percent_text(value)

    if any(factor in words for factor in _FACTORS):
        return factor_text(value)

    if name in _CORES:
        return cores_text(value)

    unit = " s" if "s" in words[1:] else ""
    is_count = float(value).is_integer() and abs(value) < _MIN_LONG
    return (count_text(int(value)) if is_count else f"{value:,.4g}") + unit
