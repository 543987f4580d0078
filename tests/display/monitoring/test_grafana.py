"""The dashboard in Grafana's own types, which are generated from the schemas that its server publishes."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from copy import deepcopy
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

DASHBOARD = json.loads((Path(__file__).parents[3] / "examples" / "grafana" / "traceml.json").read_text())
LATER = {"definition"}  # fields that Grafana 11 writes, and that only its schema of version 13 has


def _problems(dashboard: dict[str, Any]) -> list[str]:
    """What Grafana's types do not know of a dashboard: fields, and values of enumerations."""
    register_default_plugins()  # panels by type, queries by data source
    loaded = Dashboard.from_json(dashboard)
    written = json.loads(json.dumps(loaded, cls=JSONEncoder))

    return [*_lost(dashboard, written), *_strange(loaded)]


def _lost(given: Any, kept: Any, path: str = "") -> Iterator[str]:
    if isinstance(given, dict):
        for key in given.keys() - LATER:
            yield from _lost(given[key], kept[key], f"{path}.{key}") if key in kept else [f"{path}.{key}"]
    elif isinstance(given, list):
        for number, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from _lost(one, other, f"{path}[{number}]")
    elif given != kept:
        yield path


def _strange(value: Any) -> Iterator[str]:
    for each in value if isinstance(value, list) else [*value.values()] if isinstance(value, dict) else ():
        yield from _strange(each)

    if type(value).__module__.startswith("grafana_foundation_sdk.models") and not isinstance(value, Enum):
        hints = typing.get_type_hints(type(value))
        for name, held in vars(value).items():
            yield from _strange(held)
            yield from (f"{type(value).__name__}.{name} = {held!r}" for _ in _enumeration(hints[name], held))


def _enumeration(hint: Any, held: Any) -> Iterator[type[Enum]]:
    """The enumeration that a field is of, if it does not have the value."""
    for kind in (hint, *typing.get_args(hint)):
        if isinstance(kind, type) and issubclass(kind, Enum) and held not in {None, *(each.value for each in kind)}:
            yield kind


def test_grafana_knows_each_field_and_value() -> None:
    """A field that Grafana does not know does nothing, without an error."""
    assert _problems(DASHBOARD) == []


@pytest.mark.parametrize(
    ("path", "wrong", "said"),
    [
        (("panels", 0, "grid"), {"h": 3}, ".panels[0].grid"),
        (("panels", 1, "options", "colour"), "red", ".panels[1].options.colour"),
        (("panels", 0, "targets", 0, "expression"), "up", ".panels[0].targets[0].expression"),
        (("panels", 0, "fieldConfig", "defaults", "units"), "s", ".panels[0].fieldConfig.defaults.units"),
        (("graphTooltip",), 7, "Dashboard.graph_tooltip = 7"),
        (("templating", "list", 1, "type"), "querry", "VariableModel.type_val = 'querry'"),
    ],
)
def test_a_wrong_field_or_value_is_found(path: tuple[Any, ...], wrong: Any, said: str) -> None:
    """In the dashboard itself, a panel's options, a query, and a field's settings."""
    dashboard = at = deepcopy(DASHBOARD)
    for key in path[:-1]:
        at = at[key]

    at[path[-1]] = wrong

    assert _problems(dashboard) == [said]
