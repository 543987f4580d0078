"""Shared fixtures of the tests of backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from traceml.track.plugins.interfaces import BackendInterface
from traceml.track.plugins.plugin_registry import create_backend

Maker = Callable[..., BackendInterface]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Maker]:
    """Make a backend as a delivery process does: `make("jsonl", path=…)`; experiment fields by `experiment=`."""
    made: list[BackendInterface] = []

    def maker(name: str, *, experiment: dict[str, Any] | None = None, **options: Any) -> BackendInterface:
        more = {key: options.pop(key) for key in ("continue_run", "local_only", "mark") if key in options}
        about = {"id": "exp-1", "name": "first", "project": "tests", "tags": {}, "parent": None, "params": {}}
        config = {
            "options": options,
            "run_id": "20260101-000000-test-abcd",
            "run_dir": str(tmp_path / "run"),
            "experiment": {**about, **(experiment or {})},
            **more,
        }
        made.append(create_backend(name, config))
        return made[-1]

    yield maker
    for backend in made:
        backend.end_experiment()
