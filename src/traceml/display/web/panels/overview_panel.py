"""Everything that is needed to repeat a run: parameters, source, packages, command, hosts; links and downloads."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from traceml.display.web.elements import (
    Container,
    DataTable,
    FactList,
    TextNode,
    link,
    search_box,
    set_visible,
    web_link,
)
from traceml.display.web.run_files import file_path
from traceml.display.web.run_sources import RunState
from traceml.formatting import count_text, plural, printable
from traceml.renderers.about_text import about_facts, nothing_logged
from traceml.renderers.views import RunView
from traceml.run_folder import PAGE_NAME, REPORT_NAME
from traceml.runs.about import About, package_versions

__all__ = ["OverviewPanel"]

_PARAMETERS = 300
_NOT_COLLECTED = (
    "Uncommitted changes, packages and variables of this run were not recorded. Rank 0 reads them at its start with an "
    "Experiment, a tracker, or the setting collectors: TRACEML_COLLECTORS=git,environment,system."
)


class OverviewPanel:
    """Facts of a run, its parameters, and long texts that are folded."""

    def __init__(self, run_id: str) -> None:
        self._urls: list[tuple[str, str]] | None = None
        with Container("div", "grid"):
            with Container("div", "card pad"):
                self._facts = FactList("left")
                self._not_collected = TextNode("p", _NOT_COLLECTED, "note")
                self._links = Container("p", "links")
                with Container("p", "links"):
                    link("Download report.html", file_path(run_id, PAGE_NAME))
                    link("report.json", file_path(run_id, REPORT_NAME))

            with Container("div", "card", id="parameters"):
                with Container("div", "cardhead"):
                    TextNode("h3", "Parameters")
                    search_box("parameters", "parameters")

                self._parameters = DataTable((("Name", "mono"), ("Value", "long")), "parameters", searched=True)
                self._note = TextNode("p", "", "note")

        with Container("div", "card others") as self._long:
            self._diff = _Folded("Uncommitted changes")
            self._packages = _Folded("Packages")
            self._variables = _Folded("Environment variables")

    def show(self, state: RunState, view: RunView) -> None:
        """Show the current facts."""
        about = state.about
        self._facts.show([*_identity(state, view), *about_facts(view, about)])
        set_visible(self._not_collected, "environment" in about.unread and not about.not_read)
        self._show_links(view)
        params = view.report.setup.params or about.params
        shown = list(params.items())[:_PARAMETERS]
        self._parameters.show([[printable(name), _text(value)] for name, value in shown])
        self._note.set_text(_parameter_note(len(params), about))
        set_visible(self._note, len(params) > _PARAMETERS or not params)
        texts = _diff(about.git), _packages(about), _variables(about.environment)
        for folded, text in zip((self._diff, self._packages, self._variables), texts, strict=True):
            folded.show(text)

        set_visible(self._long, any(texts))

    def _show_links(self, view: RunView) -> None:
        urls = [(tracker.backend, url) for tracker in view.report.trackers for url in tracker.urls]
        if urls == self._urls:
            return

        self._urls = urls
        self._links.clear()
        set_visible(self._links, bool(urls))
        with self._links:
            for backend, url in urls:
                web_link(f"Open in {backend}", url)


class _Folded:
    """A long text behind its title; hidden while it is empty."""

    def __init__(self, title: str) -> None:
        self._title = title
        with Container("details") as self._block:
            self._summary = TextNode("summary", title)
            self._text = TextNode("pre", "", "log", tabindex="0")

    def show(self, text: str) -> None:
        set_visible(self._block, bool(text))
        self._summary.set_text(f"{self._title} ({plural(text.count(chr(10)) + 1, 'line')})")
        self._text.set_text(text)


def _identity(state: RunState, view: RunView) -> Iterable[tuple[str, str]]:
    run, labels = view.report.run, state.labels
    started = "" if run.started is None else time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(run.started))
    rows = (
        ("run", run.id),
        ("project", run.project),
        ("started", started),
        ("tags", ", ".join(dict.fromkeys([*labels.tags, *state.about.tag_texts]))),
        ("note", labels.note),
    )
    return [(name, printable(text, lines=True)) for name, text in rows if text]


def _parameter_note(count: int, about: About) -> str:
    if not count:
        none = "No parameters were logged. traceml.log_params({...}) shows them here."
        return nothing_logged(about, "Parameters", none)

    return f"{count_text(count - _PARAMETERS)} more are in report.json."


def _text(value: Any) -> str:
    return printable(str(value), lines=True)


def _diff(git: Mapping[str, Any]) -> str:
    diff = str(git.get("diff") or "")
    cut = "\n[the rest was not stored: the changes exceed 256 KiB]" if git.get("diff_truncated") else ""
    return printable(diff, lines=True) + cut


def _packages(about: About) -> str:
    return "\n".join(f"{name} {version}" for name, version in package_versions(about.environment).items())


def _variables(environment: Mapping[str, Any]) -> str:
    variables = environment.get("variables")
    if not isinstance(variables, Mapping):
        return ""

    return "\n".join(f"{name}={_text(value)}" for name, value in variables.items())
