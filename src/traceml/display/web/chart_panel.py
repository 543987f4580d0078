"""The charts of a run's page: steps, ranks, memory, system, metrics."""

from __future__ import annotations

from traceml.display.web.chart_cache import METRIC
from traceml.display.web.elements import ChartCard, Container, TextNode, search_box, section, set_visible
from traceml.display.web.run_sources import RunState
from traceml.formatting import plural, printable
from traceml.runs.rows.metrics import OWN_LOSS, metric_group

__all__ = ["ChartPanel"]

_WAITING = "Waiting for the first steps"
_TIME_PX = 130
_HEAT_ROW_PX, _HEAT_FRAME_PX, _MIN_HEAT_PX, _MAX_HEAT_PX = 26, 96, 200, 520
_RANK_ROW_PX, _RANK_FRAME_PX, _MIN_RANKS_PX, _MAX_RANKS_PX = 24, 84, 236, 560


class ChartPanel:
    """All charts of a run."""

    def __init__(self) -> None:
        self._metrics: dict[str, ChartCard] = {}
        self._groups: dict[str, Container] = {}
        self._heat_style = ""
        with section("steps", "Steps"), Container("div", "grid"):
            time = ChartCard(
                "Where the run's time went", "wall time, the mean of all ranks", waiting=_WAITING, classes="wide"
            )
            time.height(_TIME_PX)
            steps = ChartCard("Step time", "percentiles over all ranks, by step", waiting=_WAITING)
            phases = ChartCard("Where a step goes", "mean of all ranks, by step", waiting=_WAITING)

        with section("ranks", "Ranks") as self.below_ranks, Container("div", "grid"):
            self._heat = ChartCard(
                "Slow ranks",
                "own work above the median rank's, by rank and step",
                waiting=_WAITING,
                classes="heat wide",
            )
            self._ranks = ChartCard("Each rank's step", "mean, by phase", waiting=_WAITING, classes="heat wide")

        with section("machine", "Memory and system"), Container("div", "grid"):
            memory = ChartCard("Memory", "resident and device memory, by rank")
            system = ChartCard("Hosts and devices", "CPU, memory and GPU in percent")

        with section("metrics", "Metrics"):
            self._toolbar()
            with Container("div", "grid"):
                self._loss = ChartCard(
                    "Loss next to step time", "did a change in speed change the loss?", classes="wide"
                )

            self._parts = Container("div", id="metric-parts")
            self._more = TextNode("p", "", "note")
            self._none = TextNode(
                "p", "Nothing was logged. traceml.log_metric(name, value) draws a chart here.", "note card"
            )

        self._charts = {
            "time": time, "steps": steps, "phases": phases, "heat": self._heat, "ranks": self._ranks,
            "memory": memory, "system": system, "loss": self._loss,
        }  # fmt: skip

    def show(self, state: RunState, theme: str) -> list[str | None]:
        """Show the current charts; return those that the browser has to draw."""
        if state.charts is None:
            return []

        made = state.charts.of(theme)
        self._size(state)
        self._heat.visible(state.view is None or state.view.report.run.world_size > 1)
        metrics = {name.removeprefix(METRIC): option for name, option in made.items() if name.startswith(METRIC)}
        self._loss.visible("loss" in made)
        set_visible(self._none, not metrics and "loss" not in made)
        set_visible(self._tools, bool(metrics))
        hidden = state.charts.metrics - len(metrics)
        self._more.set_text(f"{plural(hidden, 'more metric')}, without a chart here: report.json has their figures.")
        set_visible(self._more, hidden > 0)
        drawn = [chart.show(made.get(name)) for name, chart in self._charts.items()]
        return drawn + [self._metric(name).show(option) for name, option in metrics.items()]

    def _metric(self, name: str) -> ChartCard:
        if name not in self._metrics:
            with self._group(metric_group(name)):
                note = "read from each backward pass" if name == OWN_LOSS else ""
                self._metrics[name] = ChartCard(printable(name), note, classes="low", words=name)

        return self._metrics[name]

    def _group(self, prefix: str) -> Container:
        """Return the place of the metrics with a prefix, those without one in a group of their own."""
        if prefix not in self._groups:
            with self._parts, Container("details", "metricgroup", open=True):
                TextNode("summary", printable(prefix) or "without prefix")
                self._groups[prefix] = Container("div", "grid three")

        return self._groups[prefix]

    def _toolbar(self) -> None:
        """Build the search and the settings of all metric charts; `charts.js` applies them, and keeps them."""
        with Container("div", "toolbar") as self._tools:
            search_box("metrics", "metric-parts")
            with Container("label"):
                TextNode("span", "Over ")
                with Container("select", "tool", data_setting="axis"):
                    for name, text in (("step", "steps"), ("seconds", "time"), ("epoch", "epochs")):
                        TextNode("option", text, value=name)

            with Container("label"):
                TextNode("span", "Smoothing ")
                Container("input", "", type="range", min="0", max="0.98", step="0.02", data_setting="smooth")

            with Container("label"):
                Container("input", "", type="checkbox", data_setting="log")
                TextNode("span", " Logarithmic")

    def _size(self, state: RunState) -> None:
        """Set the height of charts that have a row per rank."""
        ranks = len(state.view.ranks) if state.view is not None else 0
        heat = min(max(_HEAT_FRAME_PX + _HEAT_ROW_PX * ranks, _MIN_HEAT_PX), _MAX_HEAT_PX)
        bars = min(max(_RANK_FRAME_PX + _RANK_ROW_PX * ranks, _MIN_RANKS_PX), _MAX_RANKS_PX)
        if self._heat_style != (style := f"{heat} {bars}"):
            self._heat_style = style
            self._heat.height(heat)
            self._ranks.height(bars)
