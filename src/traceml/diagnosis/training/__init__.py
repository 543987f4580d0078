"""Findings about the training itself: its losses, its data, its gradients and the updates that it skips."""

from __future__ import annotations

__all__: list[str] = []
