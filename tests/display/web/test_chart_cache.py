"""Charts as JSON for the browser."""

from __future__ import annotations

import json
from pathlib import Path

from tests.diagnosis.fabricated import Job, adds
from tests.display.web.runs import NASTY, add_metrics
from tests.runs.fabricated_store import store_run
from traceml.database.store.store import StoreWriter
from traceml.display.web.chart_cache import ChartCache
from traceml.renderers.views import run_view
from traceml.run_folder import STORE_NAME
from traceml.runs.report.report import build_report
from traceml.runs.rows.series import read_series


def drawings(folder: Path, ranks: int = 3) -> ChartCache:
    """Return the drawings of a fabricated run."""
    run = store_run(folder / "run", Job(ranks=ranks, steps=120, grouped=ranks > 1), adds("forward", 9, (0,)))
    with StoreWriter(run / STORE_NAME) as writer:
        add_metrics(writer, 1, {NASTY: [0.5, float("nan"), 2.0], "loss": [1.0, 0.5, float("inf")]})

    return ChartCache(run_view(build_report(run)), read_series(run))


def test_each_theme_is_made_once_and_is_plain_json(tmp_path: Path) -> None:
    """Both themes have the same charts; values that are not finite are null, and no key of an option is a name."""
    made = drawings(tmp_path)
    light, dark = made.of("light"), made.of("dark")

    assert made.of("light") is light
    assert light.keys() == dark.keys()
    assert {"steps", "phases", "heat", "ranks", "loss", "metric:loss", f"metric:{NASTY}"} <= light.keys()
    assert all(light[name] != dark[name] for name in light)
    for option in light.values():
        assert option.isascii()
        assert not _keys(json.loads(option)) & {NASTY, "loss"}
        assert not any(key.startswith(":") for key in _keys(json.loads(option)))  # NiceGUI would run their values


def test_one_rank_has_no_heat_map(tmp_path: Path) -> None:
    assert "heat" not in drawings(tmp_path, ranks=1).of("light")


def _keys(value: object) -> set[str]:
    if isinstance(value, dict):
        return {str(key) for key in value} | {key for each in value.values() for key in _keys(each)}

    return {key for each in value for key in _keys(each)} if isinstance(value, list) else set()
