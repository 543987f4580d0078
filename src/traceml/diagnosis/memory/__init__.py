"""Findings about memory: growth, pressure, and differences between ranks."""

from __future__ import annotations

__all__: list[str] = []
