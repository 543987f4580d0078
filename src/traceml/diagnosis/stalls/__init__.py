"""Findings about pauses: the training stands still for the interpreter, the compiler or the device's clocks.

Runs in the aggregator and in readers. Imports kinds, findings, `diagnosis.facts`, `diagnosis.steps` and `database`.
"""

from __future__ import annotations

__all__: list[str] = []
