"""Fixtures for scripts that are traced by a real aggregator."""

from __future__ import annotations

from tests.recorder.conftest import quiet_process, run_script, serving

__all__ = ["quiet_process", "run_script", "serving"]
