"""Operators of the profile that the aggregator took by itself, as evidence of the finding that it explains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from traceml.database.store.reader import StoreReader
from traceml.diagnosis.findings import Finding
from traceml.formatting import line_text, ms_text

__all__ = ["with_operators"]


def with_operators(findings: Sequence[Finding], reader: StoreReader) -> list[Finding]:
    """Return the findings; the one that was profiled has the longest operators, and the file of the profile."""
    event = reader.last_event("profile")
    if event is None:
        return list(findings)

    measured = {"operators": [_text(each) for each in event.data["operators"]], "profile": event.data["file"]}
    return [
        msgspec.structs.replace(each, evidence={**each.evidence, **measured})
        if each.kind == event.data["kind"]
        else each
        for each in findings
    ]


def _text(operator: dict[str, Any]) -> str:
    """Return `aten::mm 2.32 ms (train.py:9 step)`: time per step, on the device if there is one."""
    time = ms_text(operator["device_ms"] or operator["self_cpu_ms"])
    place = f" ({line_text(operator['file'], operator['line'], operator['function'])})" if operator.get("file") else ""
    return f"{operator['name']} {time}{place}"
