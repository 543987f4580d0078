"""Filters: the values that pass, and their density."""

from __future__ import annotations

import json
import math

import pytest

from traceml.errors import PluginError
from traceml.track.filters import DeliveryFilter, check_delivery_options
from traceml.track.plugins.metric import Metric


def rows(name: str, values: list[float], rank: int = 0) -> list[Metric]:
    return [Metric(name, value, step, float(step), rank) for step, value in enumerate(values)]


def test_exclude_wins_over_include() -> None:
    rules = DeliveryFilter.of(("train/*",), ("*secret*",), {"include": ["val/loss"]})

    passing = [name for name in ("train/a", "train/secret", "val/loss", "val/acc") if rules.takes(name)]

    assert passing == ["train/a", "val/loss"]


def test_routes_name_names_and_ranks() -> None:
    rules = DeliveryFilter.of((), (), {"routes": [{"names": ["val/*"]}, {"ranks": [1]}]})

    assert rules.takes("val/loss", 3)
    assert rules.takes("train/loss", 1)
    assert not rules.takes("train/loss", 0)
    assert rules.takes("learning rate", None), "routes are for values, not for parameters"


@pytest.mark.parametrize("sample", [10, 0.1])
def test_sampling_keeps_every_so_many_steps(sample: float) -> None:
    rules = DeliveryFilter.of((), (), {"sample": sample})

    assert [row.step for row in rules.apply(rows("a", [0.0] * 35), {}, "e")] == [0, 10, 20, 30]


@pytest.mark.parametrize(
    ("by", "expected"), [("mean", [1.5, 5.5]), ("min", [0, 4]), ("max", [3, 7]), ("sum", [6, 22]), ("last", [3, 7])]
)
def test_windows_come_out_the_same_however_they_are_cut_into_batches(by: str, expected: list[float]) -> None:
    """State between batches survives JSON, as between two processes."""
    rules = DeliveryFilter.of((), (), {"aggregate": {"every": 4, "by": by}})
    memory: dict[str, object] = {}
    given = []
    for row in rows("a", [float(value) for value in range(8)]):
        given += rules.apply([row], memory, "e")
        memory = json.loads(json.dumps(memory))

    given += rules.finish(memory, "e")

    assert [row.value for row in given] == expected
    assert [row.step for row in given] == [3, 7]
    assert not memory


def test_windows_are_per_name_and_rank() -> None:
    rules = DeliveryFilter.of((), (), {"aggregate": {"every": 2}})
    memory: dict[str, object] = {}

    rules.apply([*rows("a", [1.0, 3.0]), *rows("a", [5.0, 7.0], rank=1), *rows("b", [9.0, 9.0])], memory, "e")

    assert {(row.name, row.rank, row.value) for row in rules.finish(memory, "e")} == {
        ("a", 0, 2.0), ("a", 1, 6.0), ("b", 0, 9.0),
    }  # fmt: skip


def test_nan_does_not_hide_the_least_and_the_greatest() -> None:
    for by, expected in (("min", 1.0), ("max", 2.0)):
        rules, memory = DeliveryFilter.of((), (), {"aggregate": {"every": 9, "by": by}}), {}
        rules.apply(rows("a", [math.nan, 1.0, math.nan, 2.0]), memory, "e")
        assert [row.value for row in rules.finish(memory, "e")] == [expected]


@pytest.mark.parametrize(
    "options",
    [
        {"sample": 0}, {"sample": "often"}, {"sample": True}, {"routes": "val/*"}, {"routes": [{"rank": 0}]},
        {"routes": {"ranks": ["0"]}}, {"aggregate": 10}, {"aggregate": {"every": 10, "by": "median"}}, {"include": 3},
        {"env": 5}, {"timeout_s": "60"}, {"timeout_s": 0}, {"timeout_s": math.inf}, {"fallback": ["jsonl"]},
        {"api_key_file": 5},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_understood_is_named(options: dict[str, object]) -> None:
    with pytest.raises(PluginError, match=next(iter(options))):
        check_delivery_options(options)


def test_options_for_delivery_as_they_are_documented() -> None:
    check_delivery_options({"env": "MY_*", "timeout_s": 60, "fallback": "jsonl", "api_key_file": "~/.key"})
    check_delivery_options({"env": ["MY_*"], "timeout_s": 0.5, "path": 5})
