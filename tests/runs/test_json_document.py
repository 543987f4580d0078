"""Tests for traceml.runs.json_document."""

import json
import os

import msgspec
import pytest

from traceml.runs.json_document import JsonDocument


class _Place(JsonDocument, msgspec.Struct):
    target: str
    names: dict[str, list[str]]


@pytest.mark.parametrize("form", [lambda place: json.loads(place.to_json()), JsonDocument.to_dict])
def test_a_path_whose_bytes_are_not_utf8_becomes_valid_json(form):
    path = os.fsdecode(b"runs/\xff")

    assert form(_Place(path, {path: [path, "caf\u00e9"]})) == {
        "target": "runs/?",
        "names": {"runs/?": ["runs/?", "café"]},
    }
