"""Text of `traceml profile`: the longest operators, and what the profile cost."""

from __future__ import annotations

from collections.abc import Mapping

from traceml.formatting import factor_text, line_text, ms_text, percent_text, printable, ranks_text
from traceml.runs.export.top_operators import OperatorTable, OperatorTotal

__all__ = ["operator_lines", "slowdown_line"]

_SHOWN = 15
_NAME_WIDTH = 44


def operator_lines(table: OperatorTable) -> list[str]:
    """Return the 15 longest operators, one per line, with times per step."""
    steps, has_device = max(table.steps, 1), table.has_device
    device_head = f"{'device':>10}" if has_device else ""
    lines = [f"{'per step':>8}{'':>3}{'CPU':>9}{device_head}{'calls':>8}  operator"]
    order = table.ordered()
    whole = sum(total.device_ns if has_device else max(total.self_ns, 0) for _, total in order) or 1
    for name, total in order[:_SHOWN]:
        share = (total.device_ns if has_device else max(total.self_ns, 0)) / whole
        device = f"{ms_text(total.device_ns / steps / 1e6):>10}" if has_device else ""
        cpu = ms_text(max(total.self_ns, 0) / steps / 1e6)
        calls = f"{total.calls / steps:.0f}" if total.calls else ""
        lines.append(printable(f"{percent_text(share):>8}{cpu:>12}{device}{calls:>8}  {_name(name, total)}"))

    return lines


def slowdown_line(slowdown: Mapping[int, float | None]) -> str:
    """Return how much longer the profiled steps took; empty where that is not known.

    Args:
        slowdown: by rank, profiled step time / step time before.
    """
    known = {rank: value for rank, value in slowdown.items() if value is not None}
    if not known:
        return ""

    worst = max(known, key=lambda rank: known[rank])
    if known[worst] < 1.05:
        return "Steps took as long as before while profiled."

    where = f" (on {ranks_text([worst])})" if len(known) > 1 else ""
    return f"Steps took {factor_text(known[worst])} as long while profiled{where}; the diagnosis leaves them out."


def _name(name: str, total: OperatorTotal) -> str:
    if total.place is None:
        return name

    return f"{name:<{_NAME_WIDTH}} {line_text(*total.place)}"
