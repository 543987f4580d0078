"""Findings about the training itself: its losses, its data, its gradients and the updates that it skips.

Runs in the aggregator and in readers. Imports kinds, findings, `diagnosis.facts` and `database`.
"""

from __future__ import annotations

__all__: list[str] = []
