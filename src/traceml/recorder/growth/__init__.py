"""Objects of the script that grow while memory does."""

from __future__ import annotations

__all__: list[str] = []
