"""Pauses of the training for the interpreter or for torch.compile, as rows.

Runs in the rank. May import what `recorder` may.
"""

from __future__ import annotations

__all__: list[str] = []
