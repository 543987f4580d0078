"""Pauses of the training for the interpreter or for torch.compile, as rows."""

from __future__ import annotations

__all__: list[str] = []
