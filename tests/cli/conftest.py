"""Fixtures for commands that deliver to trackers."""

from __future__ import annotations

from tests.track.conftest import empty_mlflow

__all__ = ["empty_mlflow"]
