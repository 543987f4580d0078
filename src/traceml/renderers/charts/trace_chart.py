"""Groups of a trace analysis (`traceml.analysis/1`) as a bar chart: a picture, or a page without scripts."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from traceml.formatting import count_text, cut_text, ms_text, percent_text, plural, printable
from traceml.renderers.charts.palette import LIGHT
from traceml.renderers.charts.svg_marks import escaped
from traceml.renderers.written_page import content_policy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["trace_page", "trace_picture"]

_LONGEST = 48  # characters of a label
# Names come from the trace: text of a page stays text, and a `$` begins no formula.
_STYLE = {"svg.fonttype": "none", "text.parse_math": False, "font.family": "sans-serif", "svg.hashsalt": "traceml"}
_PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8">{policy}<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:62rem;padding:0 1rem;color:#1c2733}}
svg{{width:100%;height:auto}}table{{border-collapse:collapse;width:100%}}th,td{{padding:.25rem .6rem;text-align:right;
border-bottom:1px solid #dbe1e8}}th:first-child,td:first-child{{text-align:left;overflow-wrap:anywhere}}</style></head>
<body><h1>{title}</h1><p>{about}</p>
{chart}
<table><thead><tr>{heads}</tr></thead><tbody>
{rows}
</tbody></table></body></html>
"""
_COLUMNS = (("sum", "sum_us"), ("self", "self_us"), ("mean", "mean_us"), ("p50", "p50_us"), ("p99", "p99_us"))


def trace_picture(result: Mapping[str, Any], top: int, kind: Literal["png", "svg"] = "png") -> bytes:
    """Return the chart as a picture.

    Args:
        result: plain data of `traceml.analysis/1`.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups, written = result["groups"][:top], io.BytesIO()
    with rc_context(_STYLE):
        figure = Figure(figsize=(9.0, 1.3 + 0.3 * max(len(groups), 1)), layout="constrained")
        FigureCanvasAgg(figure)
        _draw(figure, groups, result)
        figure.savefig(written, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)

    return written.getvalue()


def trace_page(result: Mapping[str, Any], top: int) -> str:
    """Return the chart and the groups' numbers as one HTML file without scripts; see `trace_picture`."""
    svg = trace_picture(result, top, "svg").decode()
    groups = result["groups"][:top]
    columns = [(head, key) for head, key in _COLUMNS if any(key in group for group in groups)]
    heads = (_title(result), "count", *(head for head, _ in columns))
    return _PAGE.format(
        policy=content_policy(),
        title=escaped(f"Time by {_title(result)}"),
        about=escaped(_about(result, len(groups))),
        chart=svg[svg.index("<svg") :],
        heads="".join(f"<th>{escaped(text)}</th>" for text in heads),
        rows="\n".join(_row(group, result["by"], [key for _, key in columns]) for group in groups),
    )


def _row(group: Mapping[str, Any], by: Sequence[str], keys: Sequence[str]) -> str:
    times = [ms_text(group[key] / 1e3) if group.get(key) is not None else "-" for key in keys]
    cells = (_label(group, by, longest=400), count_text(group["count"]), *times)
    return "<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in cells) + "</tr>"


def _draw(figure: Figure, groups: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> None:
    axes = figure.subplots()
    whole_us = sum(group["sum_us"] for group in result["groups"]) or 1
    at = range(len(groups))
    sums = [group["sum_us"] / 1e3 for group in groups]
    bars = axes.barh(at, sums, color=LIGHT.lines[0], alpha=0.35, label="with what it called")
    if groups and all(group.get("self_us") is not None for group in groups):
        axes.barh(at, [group["self_us"] / 1e3 for group in groups], color=LIGHT.lines[0], label="itself")
        axes.legend(loc="lower right", frameon=False, fontsize=8)

    axes.bar_label(bars, [f" {percent_text(group['sum_us'] / whole_us)}" for group in groups], fontsize=8)
    axes.set_yticks(at, [_label(group, result["by"]) for group in groups], fontsize=8)
    _label_axes(axes, f"Time by {_title(result)}")


def _label_axes(axes: Axes, title: str) -> None:
    axes.invert_yaxis()  # the largest on top
    axes.set_xlabel("milliseconds, sum of spans")
    axes.set_title(title, loc="left", fontsize=11)
    axes.margins(x=0.12)
    axes.grid(axis="x", color=LIGHT.rule)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _label(group: Mapping[str, Any], by: Sequence[str], longest: int = _LONGEST) -> str:
    return cut_text(printable(", ".join(str(group.get(field)) for field in by)), longest)


def _title(result: Mapping[str, Any]) -> str:
    return printable(", ".join(result["by"]))


def _about(result: Mapping[str, Any], shown: int) -> str:
    names = ", ".join(Path(file["path"]).name for file in result["files"][:3])
    more = f" and {len(result['files']) - 3} more" if len(result["files"]) > 3 else ""
    where = f", where {result['where']}" if result.get("where") else ""
    groups = f"{shown} of {plural(len(result['groups']), 'group')}"
    return printable(f"{names}{more}: {plural(result['events'], 'event')}{where}; {groups}")
