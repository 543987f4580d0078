"""Filesystem under a path: a network filesystem needs another journal than a local disk."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["network_filesystem"]

_MOUNTS = Path("/proc/self/mountinfo")
# A write-ahead log needs memory that all its readers share, which hosts do not.
_NETWORK = frozenset({
    "9p", "afs", "beegfs", "beegfs_nodev", "ceph", "cifs", "fuse.ceph", "fuse.glusterfs", "fuse.sshfs", "fuse.juicefs",
    "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "orangefs", "panfs", "pvfs2", "smb3", "smbfs", "wekafs",
})  # fmt: skip


def network_filesystem(path: Path, mounts: Path = _MOUNTS) -> str | None:
    """Return the type of the network filesystem that a path is on, None on a local one or where it is not known.

    Args:
        path: a file or folder; it need not exist yet.
    """
    place = f"{path.resolve()}/"
    found: tuple[int, str] = (-1, "")
    try:
        lines = mounts.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None

    for line in lines:
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(" "), after.split(" ")
        if len(fields) < 5 or not kinds[0]:
            continue

        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[4]).rstrip("/") + "/"
        # Of mounts on one point the last one is seen.
        if place.startswith(point) and len(point) >= found[0]:
            found = (len(point), kinds[0])

    return found[1] if found[1] in _NETWORK else None
