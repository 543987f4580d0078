"""Another host, as far as folders are concerned."""

from __future__ import annotations

import ctypes
import os

_NEW_NAMESPACE, _PRIVATE, _RECURSIVE = 0x00020000, 0x40000, 0x4000


def hide(folder: str) -> None:
    """Put this process into a mount namespace in which a folder is empty, as it is on another host."""
    libc = ctypes.CDLL(None, use_errno=True)
    calls = (
        lambda: libc.unshare(_NEW_NAMESPACE),
        lambda: libc.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None),
        lambda: libc.mount(b"none", folder.encode(), b"tmpfs", 0, None),
    )
    for call in calls:
        if call() != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
