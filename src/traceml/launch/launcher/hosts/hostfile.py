"""Hostfiles as DeepSpeed, Open MPI and PBS write them, and the port of a host name."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

from traceml.errors import UsageError

__all__ = ["is_hostfile", "read_hostfile", "split_port"]

_PORT = re.compile(r"(?P<host>(?:[^@]+@)?(?:\[[^\]]+\]|[^:\[\]]+)):(?P<port>[^:]*)")
_OPTION = re.compile(r"(?P<key>slots|max[-_]slots)=(?P<count>.*)")
_MOST = 65_535
_MAX_DIGITS = 6


def is_hostfile(text: str) -> bool:
    """Return whether a text in the place of host names is the path of a hostfile: it has a slash, or is a file."""
    if "/" in text and not text.startswith("ssh://"):
        return True

    try:
        return text not in ("auto", "slurm") and Path(text).expanduser().is_file()
    except (OSError, RuntimeError):  # longer than a name may be; a home of nobody
        return False


def read_hostfile(path: Path) -> dict[str, int | None]:
    """Return the hosts of a hostfile in its order, with their slots; None for a host without a number.

    A line is `host`, `host slots=8` or `host:port slots=8`; `max_slots=` is accepted and ignored, and `#` begins a
    comment. A host on several lines has the sum of their slots, where a line without a number counts 1.

    Raises:
        UsageError: it cannot be read, names no host, or a line has another form.
    """
    try:
        lines = path.expanduser().read_text().splitlines()
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: no text, or no path; RuntimeError: no such home
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"hostfile {path} cannot be read: {reason}") from error

    found: dict[str, list[int | None]] = {}
    for number, line in enumerate(lines, 1):
        if words := line.partition("#")[0].split():
            found.setdefault(words[0], []).append(_slots(words[1:], f"hostfile {path}, line {number}"))

    if not found:
        raise UsageError(f"hostfile {path} names no host: write one per line, for example `node1 slots=8`")

    return {host: counts[0] if len(counts) == 1 else sum(n or 1 for n in counts) for host, counts in found.items()}


def split_port(name: str) -> tuple[str, int | None]:
    """Return the host and the ssh port of a name: `node1:2222`, `user@node1:2222`, `[fe80::1]:2222`.

    An IPv6 address needs brackets before a port. A name of ssh's own form (`ssh://...`) is left as it is.

    Raises:
        UsageError: what follows the colon is not a port.
    """
    match = None if name.startswith("ssh://") or _is_address(name) else _PORT.fullmatch(name)
    if match is None:
        return name, None

    port = match["port"]
    if not (_is_number(port) and 0 < int(port) <= _MOST):
        raise UsageError(f"hostnames has {name!r}: {port!r} is not a port; give a number from 1 to {_MOST} for ssh")

    host = match["host"]
    return re.sub(r"\[([^\]]+)\]$", r"\1", host), int(port)


def _slots(words: list[str], place: str) -> int | None:
    slots = None
    for word in words:
        match = _OPTION.fullmatch(word)
        if match is None:
            raise UsageError(f"{place}: {word!r} is not understood; write `host`, `host:port` or `host slots=8`")

        count = match["count"]
        if not (_is_number(count) and int(count)):
            raise UsageError(f"{place}: {match['key']}={count} is not a number of workers; give 1 or more")

        if match["key"] == "slots":
            slots = int(count)

    return slots


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.rpartition("@")[2])
    except ValueError:
        return False

    return True
