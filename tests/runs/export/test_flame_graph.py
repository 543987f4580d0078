"""Flame graphs of sampled lines, as their viewers read them."""

from __future__ import annotations

import jsonschema
import pytest

from tests.runs.export.exported import nested
from tests.runs.report.test_line_shares import line, report_with
from traceml.runs.export.flame_graph import perfetto, speedscope

FRAME = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string"}, "file": {"type": "string"}, "line": {"type": "number"}},
    "additionalProperties": False,
}
SAMPLED = {
    "type": "object",
    "required": ["type", "name", "unit", "startValue", "endValue", "samples", "weights"],
    "properties": {
        "type": {"const": "sampled"},
        "name": {"type": "string"},
        "unit": {"enum": ["none", "nanoseconds", "microseconds", "milliseconds", "seconds", "bytes"]},
        "startValue": {"type": "number"},
        "endValue": {"type": "number"},
        "samples": {"type": "array", "items": {"type": "array", "items": {"type": "integer", "minimum": 0}}},
        "weights": {"type": "array", "items": {"type": "number"}},
    },
    "additionalProperties": False,
}
# The format that speedscope publishes, as far as sampled profiles go.
SPEEDSCOPE = {
    "type": "object",
    "required": ["$schema", "shared", "profiles"],
    "properties": {
        "$schema": {"const": "https://www.speedscope.app/file-format-schema.json"},
        "name": {"type": "string"},
        "exporter": {"type": "string"},
        "activeProfileIndex": {"type": "number"},
        "shared": {
            "type": "object",
            "required": ["frames"],
            "properties": {"frames": {"type": "array", "items": FRAME}},
        },
        "profiles": {"type": "array", "minItems": 1, "items": SAMPLED},
    },
    "additionalProperties": False,
}
RELU = "/venv/lib/python3.11/site-packages/torch/nn/functional.py:12 relu"


@pytest.fixture
def report():
    return report_with(line("forward", 30, 0.75, library=RELU), line("forward", 10, 0.25, 9), line("startup", 20, 1.0))


def test_speedscope_reads_it(report):
    """It has the published format, and each stack the time of its line."""
    graph = speedscope(report)

    jsonschema.validate(graph, SPEEDSCOPE)
    (profile,) = graph["profiles"]
    frames = graph["shared"]["frames"]
    stacks = [tuple(frames[number]["name"] for number in stack) for stack in profile["samples"]]
    assert dict(zip(stacks, profile["weights"], strict=True)) == pytest.approx(
        {
            ("forward", "main (train.py:7)", "relu (torch/nn/functional.py:12)"): 3.0,
            ("forward", "main (train.py:9)"): 1.0,
            ("start-up", "main (train.py:7)"): 8.0,
        }
    )
    assert profile["endValue"] == pytest.approx(sum(profile["weights"]))


def test_a_run_without_samples_is_an_empty_profile():
    """It is a valid file all the same."""
    jsonschema.validate(speedscope(report_with()), SPEEDSCOPE)


def test_perfetto_draws_slices_inside_each_other(report):
    """Phase, line and library function, each as wide as its time."""
    slices = [event for event in perfetto(report)["traceEvents"] if event["ph"] == "X"]

    assert [(each["name"], each["dur"], depth) for each, depth in nested(slices)] == [
        ("forward", 4_000_000, 1),
        ("main (train.py:7)", 3_000_000, 2),
        ("relu (torch/nn/functional.py:12)", 3_000_000, 3),
        ("main (train.py:9)", 1_000_000, 2),
        ("start-up", 8_000_000, 1),
        ("main (train.py:7)", 8_000_000, 2),
    ]
