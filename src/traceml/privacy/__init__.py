"""Masking of secrets and personal data; imports nothing of the package but its errors, so every room may use it."""

from traceml.privacy.masker import KINDS, Masker
from traceml.privacy.names import is_secret_name

__all__ = ["KINDS", "Masker", "is_secret_name"]
