"""Deaths: ranks that were lost, the first of them, and what ended it."""

from __future__ import annotations
