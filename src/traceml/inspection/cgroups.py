"""Folders of a process's cgroups, in both versions, and the out-of-memory kills that they count."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from traceml.inspection.kernel_state import read_text

__all__ = [
    "ROOT",
    "OomPlace",
    "OomWatch",
    "cgroup_folders",
    "cgroup_paths",
    "oom_counter",
]

ROOT = "/sys/fs/cgroup"
"""Where the cgroups are mounted."""

OomPlace = Literal["group", "host"]
"""Where the kernel counted an out-of-memory kill: in the process's cgroup, or only on its host."""


def cgroup_paths(text: str | None = None, pid: int | str = "self") -> dict[str, str]:
    """Return {controller: path}; the key of version 2 is ""."""
    groups = {}
    for line in (read_text(f"/proc/{pid}/cgroup") if text is None else text).splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3:
            groups.update(dict.fromkeys(parts[1].split(","), parts[2]))

    return groups


def _parent_folders(root: str, path: str) -> list[str]:
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
        *_parent_folders(root, groups.get("", "/")),
        *_parent_folders(f"{root}/{controller}", groups.get(controller, "/")),
    ]


_FIELD = "oom_kill "
_FILES = ("memory.events", "memory.oom_control")  # version 2, version 1
_HOST = Path("/proc/vmstat")


class OomWatch:
    """Counts the kernel's out-of-memory kills in a process's cgroup from now on, also once the process is gone.

    Where the group has no counter, the host's counter is used: its kills may be those of other programs.

    Args:
        groups: its cgroups, as `cgroups.cgroup_paths` returns them; None reads them.
    """

    __slots__ = ("_before", "_host", "_path", "_root")

    def __init__(
        self, pid: int | str = "self", *, groups: dict[str, str] | None = None, root: str = ROOT, host: Path = _HOST
    ) -> None:
        self._host, self._root = host, root
        self._path = oom_counter(cgroup_paths(pid=pid) if groups is None else groups, root, host)
        self._before = _count_kills(self._path)

    def follow(self, groups: dict[str, str]) -> None:
        """Count in another cgroup once the process has moved to it, as `systemd-run` or a script itself does.

        Args:
            groups: its cgroups now. A process that ends is in the root group for a moment.
        """
        if groups.get("memory", groups.get("", "/")) == "/":
            return

        path = oom_counter(groups, self._root, self._host)
        if path not in (self._path, self._host):
            self._path, self._before = path, _count_kills(path)

    def kills(self) -> int | None:
        """Return the kills so far; None if they are not counted."""
        now = _count_kills(self._path)
        return None if self._before is None or now is None else now - self._before

    def killed(self) -> OomPlace | None:
        """Return `group` after a kill in the process's group, `host` after one on the host; None without one."""
        if (self.kills() or 0) <= 0:
            return None

        return "host" if self._path == self._host else "group"


def oom_counter(groups: dict[str, str], root: str = ROOT, host: Path = _HOST) -> Path:
    """Return the file that counts the kills of the innermost visible group; the host's where there is none."""
    folders = cgroup_folders("memory", groups, root) if groups else []
    paths = (Path(folder) / name for folder in folders for name in _FILES)
    return next((path for path in paths if _count_kills(path) is not None), host)


def _count_kills(path: Path) -> int | None:
    """Return the kills in a counter's file; None if it has none."""
    lines = read_text(str(path)).splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(_FIELD)), None)
