"""Stores of killed writers: acknowledged rows are there, whatever the last write was."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.database.store.crash_points import MODES, check_points, recorded

_POINTS = 35


@pytest.mark.parametrize("mode", MODES)
def test_acknowledged_rows_outlive_a_kill_at_any_point(tmp_path: Path, mode: str) -> None:
    """A store is opened after each of many parts of what its writer did, also of half a write: nothing is missing."""
    try:
        writer = recorded(mode, tmp_path, seed=1)
    except OSError as error:
        pytest.skip(str(error))

    kinds = {event.kind for event in writer.events}
    assert {"create", "write", "rename", "mark"} <= kinds
    assert len(writer.events) > 500
    (tmp_path / "points").mkdir()

    assert check_points(writer, _POINTS, 7, tmp_path / "points") == _POINTS
