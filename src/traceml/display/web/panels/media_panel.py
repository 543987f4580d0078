"""Images, texts, histograms and files that a run logged."""

from __future__ import annotations

from pathlib import PurePosixPath

from traceml.display.web.chart_cache import THEMES, as_json
from traceml.display.web.elements import ChartCard, Container, TextNode, link, search_box, set_visible
from traceml.display.web.run_files import IMAGE_TYPES, file_path
from traceml.display.web.run_sources import RunState
from traceml.formatting import bytes_text, count_text, plural, printable
from traceml.renderers.about_text import nothing_logged
from traceml.renderers.charts.run_charts import histogram_chart
from traceml.runs.rows.logged_media import LoggedItem, MediaGroup

__all__ = ["MediaPanel"]

_HISTOGRAMS = 24
_FILES = 500
_NONE = (
    "No images, texts, histograms or files were logged. traceml.log_image, log_text, log_histogram and log_artifact "
    "show them here."
)


class MediaPanel:
    """Logged values other than numbers, by kind and name; the newest first."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._shown: dict[tuple[str, str], MediaGroup] = {}
        self._cards: dict[tuple[str, str], Container] = {}
        self._charts: dict[str, ChartCard] = {}
        with Container("div", id="media-parts"):
            self._search = Container("div", "toolbar")
            with self._search:
                search_box("media and files", "media-parts")

            self._grid = Container("div", "grid")
            self._files = Container("div", "card others")
            with self._files:
                TextNode("h3", "Files", "pad")

        self._none = TextNode("p", "", "note card")

    def show(self, state: RunState, theme: str) -> list[str | None]:
        """Show what is new; return the charts that the browser has to draw."""
        groups = state.logged
        files = [group for group in groups if group.kind in ("artifact", "refused")]
        set_visible(self._none, not groups)
        self._none.set_text(nothing_logged(state.about, "Images, texts, histograms and files", _NONE))
        set_visible(self._search, len(groups) > 1)
        set_visible(self._files, bool(files))
        for group in files[:_FILES]:
            self._show_card(group, self._files)

        for group in groups:
            if group.kind in ("image", "text", "value"):
                self._show_card(group, self._grid)

        histograms = [group for group in groups if group.kind == "histogram"][:_HISTOGRAMS]
        return [self._chart(group).show(as_json(histogram_chart(group.items, THEMES[theme]))) for group in histograms]

    def _show_card(self, group: MediaGroup, parent: Container) -> None:
        key = group.kind, group.name
        if self._shown.get(key) == group:
            return

        self._shown[key] = group
        if key not in self._cards:
            with parent:
                look = "file" if parent is self._files else f"card pad media {group.kind}"
                self._cards[key] = Container("div", look, data_words=f"{group.name} {group.kind}".lower())

        self._cards[key].clear()
        with self._cards[key]:
            _SHOW[group.kind](self._run_id, group)

    def _chart(self, group: MediaGroup) -> ChartCard:
        if group.name not in self._charts:
            with self._grid:
                hint = "histogram: share of the values per unit of value; one line per step"
                self._charts[group.name] = ChartCard(printable(group.name), hint, words=f"{group.name} histogram")

        return self._charts[group.name]


def _images(run_id: str, group: MediaGroup) -> None:
    _title(group)
    with Container("div", "thumbs"):
        for item in reversed(group.items):
            with Container("figure"):
                _image(run_id, group.name, item)
                TextNode("figcaption", _step(item))


def _image(run_id: str, name: str, item: LoggedItem) -> None:
    address = file_path(run_id, item.path)
    with Container("a", "", href=address, target="_blank"):
        if PurePosixPath(item.path).suffix.lower() in IMAGE_TYPES:
            Container("img", "", src=address, loading="lazy", alt=printable(f"{name}, {_step(item)}"))
        else:
            TextNode("span", "Download")


def _texts(_: str, group: MediaGroup) -> None:
    _title(group)
    for item in reversed(group.items):
        TextNode("p", _step(item), "hint")
        TextNode("pre", printable(item.text, lines=True), "logged", tabindex="0")


def _file(run_id: str, group: MediaGroup) -> None:
    item = group.items[-1]
    link(printable(group.name), file_path(run_id, item.path, PurePosixPath(group.name).name), "mono")
    older = f", {plural(group.older, 'older version')} in the run's folder" if group.older else ""
    TextNode("span", f"{bytes_text(item.size_bytes)}{older}", "hint")


def _refused(_: str, group: MediaGroup) -> None:
    TextNode("span", printable(group.name), "mono")
    TextNode("span", f"not stored: {printable(group.items[-1].text)}", "hint")


def _title(group: MediaGroup) -> None:
    TextNode("h3", printable(group.name))
    if group.older:
        TextNode("p", f"{count_text(group.older)} older ones are not shown.", "hint")


def _step(item: LoggedItem) -> str:
    return "no step" if item.step is None else f"step {count_text(item.step)}"


_SHOW = {"image": _images, "text": _texts, "value": _texts, "artifact": _file, "refused": _refused}
