"""Changes of the runs that are selected in the list: tag, note, rename, archive, delete, compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from urllib.parse import quote

from nicegui import Client, run

from traceml.display.web.elements import EMIT_VALUE, Container, TextNode, set_visible
from traceml.display.web.panels.overlay_panel import LETTERS
from traceml.errors import TraceMLError, UsageError
from traceml.formatting import bytes_text, plural, printable
from traceml.runs.find import RunInfo
from traceml.runs.remove import check_removable, is_delivered, remove_ended
from traceml.runs.run_labels import RunLabels, add_tags, change_labels, remove_tags

__all__ = ["EditBar"]

_LISTED = 12


class EditBar:
    """Buttons for the runs that are selected, hidden while there are none."""

    def __init__(self, client: Client, on_change: Callable[[], None]) -> None:
        self._client, self._on_change = client, on_change
        self._picked: Sequence[RunInfo] = ()
        self._text = ""
        self._asked = 0
        with Container("div", "card editbar", role="region", aria_label="selected runs") as self._bar:
            self._count = TextNode("b")
            self._compare = self._button("Compare", self._open_comparison, "tool main", id="compare")
            attributes = {"placeholder": "Tag, name or note", "aria_label": "tag, name or note", "maxlength": 2000}
            self._input = Container("input", "search", id="edit-text", autocomplete="off", **attributes)
            self._input.on("input", self._take_text, js_handler=EMIT_VALUE)
            self._button("Add tag", lambda: self._label(lambda labels: add_tags(labels, self._tags())))
            self._button("Remove tag", lambda: self._label(lambda labels: remove_tags(labels, self._tags())))
            self._button("Set note", lambda: self._label(self._set_note))
            self._rename = self._button("Rename", lambda: self._label(self._set_name))
            self._button("Archive", lambda: self._label(lambda labels: _archive(labels, archived=True)))
            self._button("List again", lambda: self._label(lambda labels: _archive(labels, archived=False)))
            self._button("Delete", self._ask, "tool danger")
            self._said = TextNode("span", "", "hint", role="status")

        self._dialog()
        set_visible(self._bar, False)

    def show(self, picked: Sequence[RunInfo]) -> None:
        """Show the bar for the runs that are selected, oldest first."""
        self._picked = picked
        set_visible(self._bar, bool(picked))
        self._count.set_text(f"{plural(len(picked), 'run')} selected")
        self._compare.props["disabled"] = not 2 <= len(picked) <= len(LETTERS)
        set_visible(self._rename, len(picked) == 1)

    def _button(self, text: str, action: Callable[[], object], classes: str = "tool", **attributes: str) -> TextNode:
        button = TextNode("button", text, classes, type="button", **attributes)
        button.on("click", action)
        return button

    def _dialog(self) -> None:
        with Container("dialog", "", id="delete-runs", aria_label="delete runs"):
            TextNode("h2", "Delete runs with everything in their folders?")
            self._list = TextNode("pre", "", "logged", tabindex="0")
            with Container("div", "toolbar"):
                self._confirm = self._button("Delete", self._delete, "tool danger", id="confirm-delete")
                TextNode("button", "Keep them", "tool", type="button", id="keep-runs")

    def _take_text(self, event: object) -> None:
        self._text = str(getattr(event, "args", ""))

    def _tags(self) -> list[str]:
        if not self._text.split():
            raise UsageError("Type a tag first")

        return self._text.split()

    def _set_note(self, labels: RunLabels) -> None:
        labels.note = self._text.strip()

    def _set_name(self, labels: RunLabels) -> None:
        labels.name = self._text.strip()

    def _label(self, change: Callable[[RunLabels], None]) -> None:
        """Change the labels of the selected runs; the first problem is shown, and the others are changed."""
        problems = []
        for info in self._picked:
            try:
                change_labels(info.path, change)
            except TraceMLError as error:
                problems.append(f"{info.name}: {error}")

        self._said.set_text(printable(problems[0]) if problems else f"{plural(len(self._picked), 'run')} changed")
        self._on_change()

    def _open_comparison(self) -> None:
        runs = "/".join(quote(info.id, safe="") for info in self._picked)
        if 2 <= len(self._picked) <= len(LETTERS):
            self._client.open(f"/compare/{runs}")

    async def _ask(self) -> None:
        """Open the dialog with what would be lost; the button in it is pressed twice."""
        try:
            check_removable(self._picked)
        except TraceMLError as error:
            self._said.set_text(printable(str(error)))
            return

        picked = tuple(self._picked)
        lines = await run.io_bound(lambda: [_loss(info) for info in picked[:_LISTED]])
        more = [f"and {len(picked) - _LISTED} more"] if len(picked) > _LISTED else []
        self._asked = 0
        with self._client:
            self._confirm.set_text(f"Delete {plural(len(picked), 'run')}")
            self._list.set_text("\n".join([*lines, *more]))
            self._client.run_javascript("document.getElementById('delete-runs').showModal()")

    async def _delete(self) -> None:
        self._asked += 1
        size = bytes_text(sum(info.size_bytes for info in self._picked))
        if self._asked < 2:
            self._confirm.set_text(f"Press again: {size} will be lost")
            return

        picked, self._asked = tuple(self._picked), 0
        try:
            await run.io_bound(remove_ended, picked)
            said = f"{plural(len(picked), 'run')} deleted, {size} freed"
        except TraceMLError as error:
            said = printable(str(error))

        with self._client:
            self._client.run_javascript("document.getElementById('delete-runs').close()")
            self._said.set_text(said)
            self._on_change()


def _archive(labels: RunLabels, *, archived: bool) -> None:
    labels.archived = archived


def _loss(info: RunInfo) -> str:
    lost = "" if is_delivered(info.path) else ", not yet delivered to its trackers"
    return printable(f"{info.id}  {info.state}, {bytes_text(info.size_bytes)}{lost}")
