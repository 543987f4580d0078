"""Folders of a process's control groups, in both versions."""

from __future__ import annotations

from pathlib import Path

__all__ = ["ROOT", "cgroup_folders", "cgroup_paths", "parent_folders"]

ROOT = "/sys/fs/cgroup"
"""Where the control groups are mounted."""


def cgroup_paths(text: str | None = None, pid: int | str = "self") -> dict[str, str]:
    """Return {controller: path}; the key of version 2 is ""."""
    if text is None:
        try:
            text = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8", errors="replace")
        except OSError:
            text = ""

    groups = {}
    for line in text.splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3:
            groups.update(dict.fromkeys(parts[1].split(","), parts[2]))

    return groups


def parent_folders(root: str, path: str) -> list[str]:
    """Return the folders from the group up to the root; inside a container only the root may be visible."""
    parts = [part for part in path.split("/") if part and part != ".."]
    return ["/".join([root, *parts[:n]]) for n in range(len(parts), -1, -1)]


def cgroup_folders(controller: str, groups: dict[str, str], root: str = ROOT) -> list[str]:
    """Return the folders that may have a controller's files, those of version 2 first, each group before its parents.

    Args:
        controller: its name in version 1.
        groups: the process's, as `cgroup_paths` returns them.
    """
    return [
        *parent_folders(root, groups.get("", "/")),
        *parent_folders(f"{root}/{controller}", groups.get(controller, "/")),
    ]
