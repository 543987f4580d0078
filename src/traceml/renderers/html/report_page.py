"""A run's report as HTML without scripts, light and dark: one file, which needs no network, and a cell of a notebook.

All text of a run is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

from traceml.diagnosis.findings import Finding
from traceml.formatting import (
    code_parts,
    count_text,
    ms_text,
    names_text,
    plural,
    rate_text,
)
from traceml.renderers.charts.figures import Figure, figures
from traceml.renderers.charts.palette import DARK, LIGHT, css_variables
from traceml.renderers.charts.svg_marks import escaped
from traceml.renderers.evidence import evidence_items
from traceml.renderers.html.html_tables import line_list, memory_facts, phase_table, rank_table, run_facts, stacks
from traceml.renderers.views import RunView, run_view, verdict_look
from traceml.renderers.wording import gain_sentence
from traceml.renderers.written_page import static_text, written_page
from traceml.runs.about import About
from traceml.runs.report.report_types import Report
from traceml.runs.rows.series import RunSeries

__all__ = ["finding_html", "inline_html", "report_page", "run_line", "verdict_card"]

# A notebook's own dark theme, which need not be the system's: JupyterLab, VS Code, Colab.
_DARK_GROUNDS = ('[data-jp-theme-light="false"]', ".vscode-dark", "html[theme=dark]")
_LONG = 48  # a value of the evidence with more characters, or with lines, has the width of the card


def report_page(report: Report, series: RunSeries, about: About) -> str:
    """Return the whole page."""
    view = run_view(report)
    body = [
        f'<div class="top"><h1>{escaped(view.report.run.name)}</h1><span class="brand">traceml report</span></div>',
        *run_line(view),
        verdict_card(view.report.verdict),
        *_tiles(view),
        *_section("Also found", (verdict_card(finding, first=False) for finding in view.others)),
        *_section("Charts", _chart_grid(figures(view, series))),
        *_section("Phases", phase_table(view)),
        *_section("Ranks", rank_table(view)),
        *_section("Lines of code", line_list(view)),
        *_section("Stacks of failed ranks", stacks(view)),
        *_section("Memory, trackers, tracing", memory_facts(view, series)),
        *_section("Environment, and how to repeat the run", run_facts(view, about)),
    ]
    about_page = f"traceml {escaped(report.traceml_version)}. The numbers are those of report.json next to this file."
    return written_page(
        f"{escaped(view.report.run.name)}: {escaped(view.report.verdict.kind)}",
        static_text("report.css"),
        f"<main>{''.join(body)}<footer>{about_page}</footer></main>",
    )


def verdict_card(verdict: Finding, *, first: bool = True, with_evidence: bool = True) -> str:
    """Return a finding with its evidence and advice.

    Args:
        first: whether it is the verdict.
        with_evidence: whether its numbers are shown.
    """
    heading = f'<p class="headline">{escaped(verdict.headline)}</p>'
    gaining = gain_sentence(verdict)
    gain = f'<p class="gain"><b>Gain</b>{gaining}</p>' if gaining else ""
    to_do = f'<p class="next"><b>Next</b>{_prose(verdict.next)}</p>' if verdict.next else ""
    return (
        f'<section class="card {"verdict" if first else "finding"} {verdict_look(verdict.kind, verdict.severity)}">'
        f'<span class="kind">{escaped(verdict.kind)}</span>{heading}<p>{_prose(verdict.summary)}</p>'
        f"{gain}{to_do}{_evidence(verdict.evidence) if with_evidence else ''}</section>"
    )


def _prose(text: str) -> str:
    return "".join(f"<code>{escaped(part)}</code>" if is_code else escaped(part) for part, is_code in code_parts(text))


def _evidence(evidence: Mapping[str, Any]) -> str:
    content = "".join(_fact(name, value) for name, value in evidence_items(evidence))
    return f'<dl class="evidence">{content}</dl>' if content else ""


def _fact(name: str, value: str) -> str:
    is_long = "\n" in value or len(value) > _LONG
    return f"<div{' class=long' if is_long else ''}><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>"


def run_line(view: RunView) -> Iterator[str]:
    """Yield one line about the run: id, ranks, hosts, state, date."""
    run = view.report.run
    facts = [plural(run.world_size, "rank"), names_text(run.hosts), view.outcome]
    if run.attempt:
        facts.append(f"attempt {run.attempt + 1}")

    text = " · ".join(escaped(fact) for fact in (run.id, *facts, _date(run.started)) if fact)
    yield f'<p class="sub">{text}</p>'
    yield from (f'<p class="sub">{escaped(note)}.</p>' for note in view.remarks)


def _date(started: float | None) -> str:
    from datetime import UTC, datetime

    return f"{datetime.fromtimestamp(started, UTC):%Y-%m-%d %H:%M} UTC" if started else ""


def _tiles(view: RunView) -> Iterator[str]:
    tiles = (
        ("steps per second", rate_text(view.steps_per_second)),
        *((f"{unit} per second", number) for unit, number in view.data_rates),
        ("steps", count_text(view.report.steps.count)),
        ("mean step", ms_text(view.report.steps.mean_ms)),
        *view.percentiles,
    )
    yield '<div class="tiles">'
    yield from (f'<div class="tile"><b>{escaped(value)}</b><span>{name}</span></div>' for name, value in tiles)
    yield f'</div><p class="more">{_sample_line(view)}Overhead of tracing: {escaped(view.overhead)}.</p>'


def _sample_line(view: RunView) -> str:
    """Return sentences on what verdict, step times and rates rest on; empty if they rest on all of the run."""
    return "".join(f"{escaped(text)}. " for text in view.basis)


def _chart_grid(shown: list[Figure]) -> Iterator[str]:
    """Yield charts side by side, as many as fit."""
    if not shown:
        return

    yield '<div class="charts">'
    for figure in shown:
        caption = f"<figcaption><h3>{escaped(figure.title)}</h3><p>{escaped(figure.note)}</p></figcaption>"
        yield f"<figure>{caption}{figure.svg}</figure>"

    yield "</div>"


def _section(title: str, parts: Iterable[str]) -> Iterator[str]:
    """Yield a section; nothing where it is empty."""
    content = "".join(parts)
    if content:
        yield f"<h2>{title}</h2>{content}"


def inline_html(report: Report, series: RunSeries) -> str:
    """Return a run for a notebook: verdict and charts."""
    view = run_view(report)
    body = "".join(
        [
            *run_line(view),
            verdict_card(view.report.verdict, with_evidence=False),
            f'<p class="sub">{line}</p>' if (line := _sample_line(view)) else "",
            *_chart_grid(figures(view, series)),
        ]
    )
    return _fragment(body)


def finding_html(finding: Finding) -> str:
    """Return one finding for a notebook, with its numbers."""
    return _fragment(verdict_card(finding))


def _fragment(body: str) -> str:
    # The light colors are set on the element itself: a notebook that removes style sheets still shows the charts.
    return f'<style>{_inline_style_sheet()}</style><div class="tm-shown" style="{css_variables(LIGHT)}">{body}</div>'


@cache
def _inline_style_sheet() -> str:
    dark = css_variables(DARK).replace(";", "!important;")
    return static_text("inline.css") + "".join(f"{ground} .tm-shown{{{dark}}}" for ground in _DARK_GROUNDS)
