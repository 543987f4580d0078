"""Masking of secrets and personal data; imports nothing of the package but its errors, so every room may use it."""

from __future__ import annotations

from functools import cache

from traceml.privacy.masker import KINDS, Masker
from traceml.privacy.name_rules import is_secret_name

__all__ = ["KINDS", "Masker", "is_secret_name", "secrets_only"]


@cache
def secrets_only(patterns: tuple[str, ...] = ()) -> Masker:
    """Return what masks secrets alone, for what is kept on this machine: paths and names are its user's own there.

    Args:
        patterns: the `mask` setting, of which only the exemptions count.
    """
    exempt = (each for each in patterns if each.startswith("!"))
    return Masker((*exempt, "!email", "!phone", "!card", "!user"), user_name="")
