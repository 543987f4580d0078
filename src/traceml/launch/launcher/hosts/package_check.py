"""Check whether a host has the very files that the launcher would send there.

The program of `bootstrap` has this source, and compares on the host before anything is imported there.
"""

from __future__ import annotations

__all__ = ["files_stamp", "has_files"]


def has_files(folders: list[str], stamp: int, origins: dict[str, str]) -> bool:
    """Return whether these folders have the same modules here, and nobody else could have written them.

    Args:
        folders: the package's own first.
        stamp: `files_stamp` of them at the launcher.
        origins: files that modules must be imported from.
    """
    import importlib.util
    import os
    import sys

    try:
        about = os.stat(folders[0])  # noqa: PTH116 - pathlib would cost more than the comparison
        trusted = {0, os.geteuid(), os.stat(sys.executable).st_uid}  # noqa: PTH116
        if about.st_uid not in trusted or about.st_mode & 0o002 or files_stamp(folders) != stamp:
            return False

        found = {name: importlib.util.find_spec(name) for name in origins}
    except (OSError, ValueError):
        return False

    return all(spec is not None and spec.origin == origins[name] for name, spec in found.items())


def files_stamp(folders: list[str]) -> int:
    """Return a checksum of the names and contents of the modules in these folders, without subfolders."""
    import os
    import zlib

    stamp = 0
    for folder in folders:
        for name in sorted(os.listdir(folder)):  # noqa: PTH208
            if name.endswith(".py"):
                with open(f"{folder}/{name}", "rb", 0) as file:
                    data = file.read()

                stamp = zlib.crc32(data, zlib.crc32(f"{folder}/{name} {len(data)} ".encode(), stamp))

    return stamp
