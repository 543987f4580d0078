"""Findings about pauses: the training stands still for the interpreter, the compiler or the device's clocks."""

from __future__ import annotations

__all__: list[str] = []
