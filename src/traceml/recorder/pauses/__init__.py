"""Pauses of the training, as rows: garbage collections, compilations by torch.compile, checkpoints.

Runs in the rank. May import what `recorder` may.
"""

from __future__ import annotations

__all__: list[str] = []
