"""Charts as ECharts options."""

from __future__ import annotations

import json

import numpy as np
import pytest
from msgspec.structs import replace

from tests.diagnosis.fabricated import Job, adds
from tests.runs.fabricated_store import add_rank, rows_of, run_facts
from tests.runs.rows.test_metric_series import log
from traceml.database.store.store import StoreWriter
from traceml.renderers.charts import run_charts
from traceml.renderers.charts.palette import BY_CSS, DARK, LIGHT, css_variables
from traceml.renderers.views import run_view
from traceml.run_folder import STORE_NAME
from traceml.runs.report.report import build_report
from traceml.runs.rows.series import HeatMap, RunSeries, SampleSeries, read_series


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a straggler and a loss: (view, series)."""
    folder = tmp_path_factory.mktemp("run")
    with StoreWriter(folder / STORE_NAME) as writer:
        writer.put_meta("run", run_facts())
        for rank, rows in enumerate(rows_of(Job(steps=200), adds("forward", 20, (1,)))):
            stream = add_rank(writer, rank, rows)
            log(writer, stream, ["train/loss", "lr"], [3.0, 2.0, float("nan"), 1.0])

    return run_view(build_report(folder)), read_series(folder)


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("empty")
    with StoreWriter(folder / STORE_NAME) as writer:
        writer.put_meta("run", run_facts())

    return run_view(build_report(folder)), read_series(folder)


def _all(view, series, theme=LIGHT):
    options = [
        run_charts.step_time_chart(series.steps, theme),
        run_charts.phases_chart(series.steps, theme),
        run_charts.ranks_chart(view, theme),
        run_charts.heatmap_chart(series.heat, theme),
        run_charts.memory_chart(series, theme),
        run_charts.system_chart(series, theme),
        run_charts.loss_chart(series, theme),
    ]
    return [*options, *(option for _, option in run_charts.metric_charts(series, theme))]


@pytest.mark.parametrize("theme", [LIGHT, DARK, BY_CSS], ids=["light", "dark", "css"])
def test_every_chart_is_json(run, theme):
    """Options cross the wire to a browser: no NaN, no arrays, no functions."""
    drawn = [option for option in _all(*run, theme) if option is not None]

    assert len(drawn) == 7  # five of the steps and the loss, two of metrics
    for option in drawn:
        assert json.loads(json.dumps(option, allow_nan=False)) == option


def test_what_is_not_there_is_not_drawn(empty):
    """A run without steps, samples and metrics has no charts, and no errors."""
    assert [option for option in _all(*empty) if option is not None] == []


def test_phases_stack_up_to_the_step(run):
    """The stacked areas add up to the mean step time."""
    view, series = run
    option = run_charts.phases_chart(series.steps)
    top = [sum(values) for values in zip(*(each["data"] for each in option["series"]), strict=True)]

    assert {each["stack"] for each in option["series"]} == {"step"}
    assert np.mean(top) == pytest.approx(view.report.steps.mean_ms, rel=0.03)


def test_the_slow_rank_is_marked(run):
    """Its bar has a mark, and only its row of the heat map is bright."""
    view, series = run
    labels = run_charts.ranks_chart(view)["yAxis"]["data"]
    heat = run_charts.heatmap_chart(series.heat)

    assert labels[0] == "rank 0"
    assert labels[1].endswith("rank 1")
    assert labels[1] != "rank 1"
    assert {row for _, row, value in heat["series"][0]["data"] if value > 20} == {1}


def test_one_first_step_does_not_press_the_others_down(run):
    """The axis ends near the top of nearly all values when a few are far above."""
    steps = run[1].steps
    slow = steps.p99_ms.copy()
    slow[0] = 5_000.0
    spiky = type(steps)(
        steps.steps, steps.width, steps.p50_ms, steps.p95_ms, slow, steps.max_ms, steps.phases_ms
    )  # fmt: skip

    assert run_charts.step_time_chart(spiky)["yAxis"]["max"] < 200
    assert "max" not in run_charts.step_time_chart(steps)["yAxis"]


def test_the_loss_has_an_axis_of_its_own(run):
    """Loss and step time share only the steps; a value that is not finite is a gap."""
    option = run_charts.loss_chart(run[1])

    assert [each["name"] for each in option["series"]] == ["step time p50", "train/loss"]
    assert option["series"][1]["yAxisIndex"] == 1
    assert [pair[1] for pair in option["series"][1]["data"]] == [3, 2, None, 1]


def test_ranks_of_a_metric_share_a_chart(run):
    """`loss` and `loss/rank_1` are lines of one chart, the loss before the rest."""
    drawn = run_charts.metric_charts(run[1])

    assert [name for name, _ in drawn] == ["train/loss", "lr"]
    assert [each["name"] for each in drawn[0][1]["series"]] == ["train/loss", "train/loss/rank_1"]


def test_many_metrics_leave_charts_to_the_others(run):
    """Of more metrics than charts, each group has some."""
    lr = next(line for line in run[1].metrics if line.name == "lr")
    names = [*(f"grad/layer{number}" for number in range(30)), "val/accuracy"]
    series = RunSeries(run[1].steps, run[1].heat, metrics=tuple(replace(lr, name=name) for name in names))

    assert [name for name, _ in run_charts.metric_charts(series, most=3)] == [
        "grad/layer0",
        "grad/layer1",
        "val/accuracy",
    ]


def test_lines_fill_a_chart_without_a_legend(run):
    """One line of finite values has nothing above it; a legend or a count of the others keeps its place."""
    lr = replace(next(line for line in run[1].metrics if line.name == "lr"), missing=0)
    alone = run_charts.metric_charts(RunSeries(run[1].steps, run[1].heat, metrics=(lr,)))[0][1]
    ranks = next(option for name, option in run_charts.metric_charts(run[1]) if name == "train/loss")
    gaps = run_charts.metric_charts(RunSeries(run[1].steps, run[1].heat, metrics=(replace(lr, missing=1),)))[0][1]

    assert alone["grid"]["top"] < 16
    assert ranks["grid"]["top"] == gaps["grid"]["top"] > 40


def test_values_that_are_not_finite_are_counted(run):
    """They are gaps; a metric that has no other value would be an empty chart."""
    loss, *_ = run[1].metrics
    finite = RunSeries(run[1].steps, run[1].heat, metrics=(replace(loss, missing=0),))

    assert run_charts.metric_charts(run[1])[0][1]["title"]["text"] == "2 values NaN or infinite"
    assert "title" not in run_charts.metric_charts(finite)[0][1]


def test_of_many_lines_three_are_drawn(run):
    """Of a hundred ranks the highest, a median and the lowest memory are drawn."""
    lines = tuple(SampleSeries(f"rank {rank}", np.arange(3.0), np.full(3, rank * 2.0**30)) for rank in range(100))
    series = RunSeries(run[1].steps, run[1].heat, memory=lines)

    names = [each["name"] for each in run_charts.memory_chart(series)["series"]]

    assert names == ["rank 99", "rank 49", "rank 0"]


def test_a_rank_without_rows_is_a_hole_in_the_heat_map():
    """Unknown cells are left out, also when all are unknown."""
    work = np.array([[1.0, np.nan], [1.0, 2.0]])
    heat = HeatMap(((0, 0), (1, 1)), np.array([0, 1]), 1, work, np.zeros((2, 2)) * work)

    assert len(run_charts.heatmap_chart(heat)["series"][0]["data"]) == 3
    unknown = HeatMap(heat.ranks, heat.steps, 1, work * np.nan, work * np.nan)
    assert run_charts.heatmap_chart(unknown) is None


@pytest.mark.parametrize(("rows", "labeled"), [(2, 2), (32, 32), (33, 17), (125, 32)])
def test_rows_of_the_heat_map_are_labeled_where_there_is_room(rows, labeled):
    """Up to 32 rows each has its label; of more every n-th has one."""
    work = np.ones((rows, 4)) * np.arange(rows)[:, None]
    heat = HeatMap([(row, row) for row in range(rows)], np.arange(4), 1, work, work)

    axis = run_charts.heatmap_chart(heat)["yAxis"]
    assert len(axis["data"][:: axis["axisLabel"]["interval"] + 1]) == labeled


def test_users_phases_have_colors_of_their_own():
    """User phases have different colors, in order of appearance."""
    colors = LIGHT.of_phases(["forward", "augment", "tokenize"])

    assert len(set(colors.values())) == 3
    assert colors["forward"] == LIGHT.phases["forward"]


def test_a_style_sheet_knows_every_color():
    """Each variable that a drawing may use is declared by both themes."""
    used = {*BY_CSS.phases.values(), *BY_CSS.users, *BY_CSS.lines, *BY_CSS.heat, BY_CSS.text, BY_CSS.ground}

    for theme in (LIGHT, DARK):
        declared = css_variables(theme)
        assert all(f"{color.removeprefix('var(').removesuffix(')')}:#" in declared for color in used)


def test_names_are_kept_as_they_are(tmp_path):
    """The option holds the name itself; drawing escapes it, once."""
    with StoreWriter(tmp_path / STORE_NAME) as writer:
        writer.put_meta("run", run_facts())
        log(writer, add_rank(writer, 0, rows_of(Job(steps=60))[0]), ["<b>&"], [1.0])

    assert run_charts.metric_charts(read_series(tmp_path))[0][0] == "<b>&"


@pytest.mark.parametrize(
    ("logged", "placed"),
    [
        ([0, 0, 1, 1, 2, 2], [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]),  # as Lightning does
        ([0.5, 1.0, 1.5, 2.0], [0.5, 1.0, 1.5, 2.0]),  # as transformers do
        ([3, 3, 3], [3.0, 3.0, 3.0]),  # nothing says how long an epoch is
    ],
)
def test_points_of_an_epoch_are_spread_over_it(tmp_path, logged, placed):
    """The axis of epochs puts each step where it is in its epoch."""
    with StoreWriter(tmp_path / STORE_NAME) as writer:
        writer.put_meta("run", run_facts())
        log(writer, add_rank(writer, 0, rows_of(Job(steps=60))[0]), ["epoch"], logged)

    option = run_charts.metric_charts(read_series(tmp_path), axes=True)[0][1]
    assert option["traceml"]["epoch"] == [placed]
