"""Values that are not JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest

from traceml.traces.writer.encoding import InstantEvent, args_of, lines


class Loud:
    def __str__(self):
        raise RuntimeError("no")


def _cycle():
    ring = {}
    ring["self"] = ring
    return ring


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (1 << 70, 1 << 70),
        (float("nan"), None),
        ("\ud800 half", "\\ud800 half"),
        (np.float32(1.5), "1.5"),
        (b"ab", "YWI="),
        (Loud(), "<Loud>"),
        (_cycle(), "<dict>"),
        ({"a": [1, {"b": None}]}, {"a": [1, {"b": None}]}),
        ('quote " comma, \n line', 'quote " comma, \n line'),
    ],
)
def test_any_value_becomes_json(value, written):
    """Any argument gives one valid line of JSON."""
    assert json.loads(bytes(args_of({"key": value}))) == {"key": written}


def test_arguments_are_taken_at_once():
    """Later changes of a value are not written."""
    changing = [1]
    packed = args_of({"list": changing})
    changing.append(2)

    assert json.loads(bytes(packed)) == {"list": [1]}


def test_names_beyond_unicode_are_written():
    """A file name that is not UTF-8 is written with its bytes escaped; other events are not affected."""
    events = [InstantEvent(1, name, "", 1, 1, 1, "i", s="t", args=args_of({})) for name in ("a", "\udcff,\n", "ü")]

    assert [json.loads(line)["name"] for line in lines(events).splitlines()] == ["a", "\\udcff,\n", "ü"]
