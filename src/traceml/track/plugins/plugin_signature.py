"""Signature of the code that a run names: proof that a process of this user has named it.

A delivery imports the plugins of a run from the folders in its announcement. In a run from elsewhere they may be
anybody's, so the announcement bears an HMAC of them with a key that is in a file of this user. A copy of an own run
proves no more than the user's own run did: the same names, in the same folders of this machine.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import get_native_id
from typing import Any

from traceml.trusted_files import cache_home, create_trusted, make_trusted_folder, opened_trusted

__all__ = ["SIGNED", "is_signed", "sign"]

_FIELDS = ("backends", "registered", "sys_path")
SIGNED = (*_FIELDS, "signature")
"""Fields of an announcement that belong together."""
_KEY_BYTES = 32


def sign(row: Mapping[str, Any]) -> str:
    """Return the signature of an announcement's plugins and folders; empty if this user can keep no key."""
    try:
        key = _read_key() or _make_key()
    except OSError:
        return ""

    return _digest(key, row)


def is_signed(row: Mapping[str, Any]) -> bool:
    """Return whether an announcement bears the signature of this user."""
    try:
        key = _read_key()
    except OSError:
        return False

    return key is not None and hmac.compare_digest(_digest(key, row).encode(), str(row.get("signature")).encode())


def _digest(key: bytes, row: Mapping[str, Any]) -> str:
    facts = json.dumps([row.get(name) for name in _FIELDS], sort_keys=True, default=str)
    return hmac.digest(key, facts.encode(), hashlib.sha256).hex()


def _key_path() -> Path:
    return cache_home() / "traceml" / "keys" / "runs"


def _read_key() -> bytes | None:
    """Return the key, None if none was made."""
    with suppress(FileNotFoundError), opened_trusted(_key_path()) as descriptor:
        key = os.read(descriptor, _KEY_BYTES)
        return key if len(key) == _KEY_BYTES else None

    return None


def _make_key() -> bytes:
    """Make a key, or read the one that another process has made at the same time."""
    path = _key_path()
    make_trusted_folder(path.parent)
    draft = path.with_name(f".{path.name}-{os.getpid()}-{get_native_id()}")
    descriptor = create_trusted(draft)
    try:
        os.write(descriptor, secrets.token_bytes(_KEY_BYTES))
        with suppress(FileExistsError):
            os.link(draft, path)  # complete from its first moment, and never in place of another
    finally:
        os.close(descriptor)
        draft.unlink(missing_ok=True)

    key = _read_key()
    if key is None:
        raise OSError(f"{path} holds no key")

    return key
