"""Content policy of written pages: nothing is loaded, and no script runs but our own, should a text ever be markup."""

from __future__ import annotations

import base64
import hashlib

__all__ = ["content_policy"]


def content_policy(script: str = "") -> str:
    """Return the `meta` element of a page's head, before anything else in it that counts.

    Args:
        script: the only script that may run; empty for none.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    scripts = f"script-src 'sha256-{digest}'; " if script else ""
    policy = (
        f"default-src 'none'; {scripts}style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    return f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
