"""The verdict of a run with its evidence and advice, at the top of its page."""

from __future__ import annotations

from traceml.database.states import RunStatus
from traceml.diagnosis.findings import Finding
from traceml.display.web.elements import Container, FactList, Prose, TextNode, set_classes, set_visible
from traceml.formatting import count_text, duration_text, gain_text, ms_text, rate_text
from traceml.renderers.evidence import evidence_items
from traceml.renderers.views import RunView, verdict_look
from traceml.renderers.wording import cost_text

__all__ = ["FindingsPanel", "VerdictCard"]

_EVIDENCE = 12


class VerdictCard:
    """The verdict, its evidence, and what to do next."""

    def __init__(self) -> None:
        with Container("div", "card verdict") as self._card:
            with Container("div", "statement"):
                with Container("div", "tags"):
                    self._kind = TextNode("span", "", "pill kind")
                    self._state = TextNode("span", "", "pill")

                self._headline = TextNode("h1", "", aria_live="polite")
                self._summary = Prose("p", "summary")
                with Container("div", "next") as self._next_block:
                    TextNode("b", "Next")
                    self._next = Prose("span")

                self._figures = FactList("figures")
                self._notes = Prose("p", "note")

            with Container("div", "evidence"):
                TextNode("h2", "Evidence")
                self._facts = FactList()

    def show(self, view: RunView) -> None:
        """Show the current verdict."""
        verdict = view.report.verdict
        look = verdict_look(verdict.kind, verdict.severity)
        set_classes(self._card, f"card verdict {look}")
        self._kind.set_text(verdict.kind.replace("_", " "))
        set_classes(self._kind, f"pill kind {look}")
        self._state.set_text(view.report.run.state)
        set_classes(self._state, f"pill {view.report.run.state}")
        self._headline.set_text(verdict.headline)
        self._summary.set_text(verdict.summary)
        self._next.set_text(verdict.next)
        set_visible(self._next_block, bool(verdict.next))
        self._facts.show([*_costs(verdict), *evidence_items(verdict.evidence)][:_EVIDENCE])
        self._figures.show(_figures(view))
        notes = [*view.remarks, *view.basis]
        self._notes.set_text("".join(f"{note}. " for note in notes))
        set_visible(self._notes, bool(notes))


class FindingsPanel:
    """The other findings."""

    def __init__(self) -> None:
        self._rows: list[tuple[Container, TextNode, TextNode, Prose]] = []
        with Container("div") as self._section:
            TextNode("h2", "Also found")
            self._card = Container("div", "card")

    def show(self, view: RunView) -> None:
        """Show the current findings."""
        set_visible(self._section, bool(view.others))
        for number, finding in enumerate(view.others):
            if number == len(self._rows):
                self._add()

            row, kind, head, next_ = self._rows[number]
            set_visible(row, True)
            kind.set_text(finding.kind.replace("_", " "))
            set_classes(kind, f"pill {finding.severity}")
            head.set_text(finding.headline)
            next_.set_text(" ".join(part for part in (finding.summary, finding.next) if part))

        for row, *_ in self._rows[len(view.others) :]:
            set_visible(row, False)

    def _add(self) -> None:
        with self._card, Container("div", "other") as row:
            kind = TextNode("span", "", "pill")
            with Container("div"):
                self._rows.append((row, kind, TextNode("p", "", "head"), Prose("p")))


def _costs(verdict: Finding) -> list[tuple[str, str]]:
    cost = cost_text(verdict)
    costs = [] if cost is None else [("costs", cost)]
    if verdict.gain is not None:
        costs.append(("if fixed", gain_text(verdict.gain)))

    return costs


def _figures(view: RunView) -> list[tuple[str, str]]:
    return [
        ("Steps per second", rate_text(view.steps_per_second)),
        *((f"{unit.capitalize()} per second", number) for unit, number in view.data_rates),
        ("Mean step", ms_text(view.report.steps.mean_ms)),
        *view.percentiles,
        ("Steps", count_text(view.report.steps.count)),
        ("Ranks", _ranks(view)),
        (
            "Runs for" if view.report.run.state == RunStatus.RUNNING else "Took",
            duration_text(view.report.run.duration_s),
        ),
    ]


def _ranks(view: RunView) -> str:
    connected, expected = len(view.ranks), view.report.run.world_size
    return count_text(expected) if connected >= expected else f"{count_text(connected)} of {count_text(expected)}"
