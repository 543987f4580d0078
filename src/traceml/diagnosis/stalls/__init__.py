"""Findings about pauses: the interpreter or the compiler stops the training, or the device lowers its clock.

Runs in the aggregator and in readers. Imports kinds, findings, `diagnosis.facts`, `diagnosis.steps` and `database`.
"""

from __future__ import annotations

__all__: list[str] = []
