"""A capture never disturbs the calls that it captures, and counts those that it could not read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import pytest

from traceml.fail_open import failures
from traceml.track.rank.frameworks.framework_capture import FrameworkCapture


class Writer:
    """A framework's logger."""

    def add(self, value: float) -> str:
        """Accept numbers only."""
        return f"{value:.1f}"


class WriterCapture(FrameworkCapture):
    """Capture of `Writer`, which cannot read negative numbers."""

    def targets(self) -> Mapping[str, Callable[[ModuleType], None]]:
        """Return this module, whose class is patched."""
        return {__name__: self._patch}

    def _patch(self, module: ModuleType) -> None:
        def before(_: Writer, value: float) -> float:
            if float(value) < 0:
                raise ZeroDivisionError("negative")
            return value

        self.around(Writer, "add", before, lambda orchestrator, value: orchestrator.append(value))  # type: ignore[attr-defined]


@pytest.fixture
def logged() -> Iterator[list[Any]]:
    """Values that a capture takes."""
    values: list[Any] = []
    capture = WriterCapture()
    capture.patch(values)  # type: ignore[arg-type]
    yield values
    capture.unpatch()


def test_a_call_that_cannot_be_read_is_counted(logged: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    """The call has its result; the failure is a warning once, and in the counts of the report each time."""
    before = failures().get("track", 0)
    caplog.set_level(logging.WARNING, logger="traceml")

    assert [Writer().add(value) for value in (-1.0, 2.5, -3.0)] == ["-1.0", "2.5", "-3.0"]

    assert logged == [2.5]
    assert failures()["track"] == before + 2
    assert [record.getMessage() for record in caplog.records] == [
        "a call of add was not captured: ZeroDivisionError('negative')"
    ]


def test_a_call_that_the_framework_refuses_is_no_failure(logged: list[Any]) -> None:
    """The script's mistake is the framework's to report, and no failure of tracing."""
    before = failures().get("track", 0)

    with pytest.raises(ValueError, match="format"):
        Writer().add("text")  # type: ignore[arg-type]

    assert logged == []
    assert failures().get("track", 0) == before
