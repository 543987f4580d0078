"""Masking of secrets and personal data.

Runs in every process. Imports only `errors`, so every package may use it.
"""

from __future__ import annotations

from functools import cache

from traceml.privacy.masker import KINDS, Masker
from traceml.privacy.name_rules import is_secret_name

__all__ = ["KINDS", "Masker", "is_secret_name", "secrets_only"]


@cache
def secrets_only(patterns: tuple[str, ...] = ()) -> Masker:
    """Return a masker for secrets alone, for data that stays on this machine, where personal data is the user's own.

    Args:
        patterns: the `mask` setting, of which only the exemptions count.
    """
    exempt = (each for each in patterns if each.startswith("!"))
    return Masker((*exempt, "!email", "!phone", "!card", "!user"), user_name="")
