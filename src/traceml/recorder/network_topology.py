"""Switches above a host, from Slurm's environment or a file in the format of Slurm's `topology.conf`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

__all__ = ["switches_above"]

_MAX_LEVELS = 8
_MAX_BYTES = 16 << 20
_ENTRY = re.compile(r"(\w+)=(\S+)", re.ASCII)
_NAMES = re.compile(r"(?:[^,\[]|\[[^\]]*\])+")
_CONTINUED = re.compile(r"\\[ \t]*\r?\n")
_DIGITS = re.compile(r"[0-9]*")


def switches_above(host: str, environ: Mapping[str, str], file: Path | None = None) -> list[str]:
    """Return the switches above a host, its leaf switch first; empty if unknown.

    Args:
        environ: variables of a process that Slurm started; read where there is no file.
        file: lines `SwitchName=leaf1 Nodes=gpu[001-032]` and `SwitchName=top Switches=leaf[1-4]`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not text, or is too large for a topology.
    """
    if file is not None:
        return list(_above(host, _parents(_text_of(file))))

    names = environ.get("SLURM_TOPOLOGY_ADDR", "").split(".")
    kinds = environ.get("SLURM_TOPOLOGY_ADDR_PATTERN", "").split(".")
    if len(names) < len(kinds):
        return []

    # A host's name may have periods: it is the last component.
    above = [name for name, kind in zip(names, kinds, strict=False) if kind != "node" and name]
    return above[::-1][:_MAX_LEVELS]


def _text_of(file: Path) -> str:
    with file.open("rb") as opened:
        data = opened.read(_MAX_BYTES + 1)

    if len(data) > _MAX_BYTES:
        raise ValueError(f"{file} has more than {_MAX_BYTES >> 20} MiB: it is not the topology of a cluster")

    return data.decode()


def _parents(text: str) -> list[tuple[str, str]]:
    """Return (expression of children, switch) of each line; names of entries have no case."""
    found = []
    for line in _CONTINUED.sub("", text).splitlines():
        entries = {name.lower(): value for name, value in _ENTRY.findall(line.partition("#")[0])}
        switch = entries.get("switchname") or entries.get("blockname")
        found += [(entries[kind], switch) for kind in ("nodes", "switches") if switch and kind in entries]

    return found


def _above(host: str, parents: Iterable[tuple[str, str]]) -> Iterator[str]:
    known = list(parents)
    names = {host, host.partition(".")[0]}
    for _ in range(_MAX_LEVELS):
        switch = next((switch for children, switch in known if any(_has(children, name) for name in names)), None)
        if switch is None:
            return

        yield switch
        names = {switch}


def _has(expression: str, name: str) -> bool:
    """Return whether a host list such as `gpu[001-032,040],rack[0-3]n[1-8],cpu1` has a name."""
    return any(_is_one(part, name) for part in _NAMES.findall(expression))


def _is_one(part: str, name: str) -> bool:
    before, bracket, rest = part.partition("[")
    if not bracket:
        return part == name

    ranges, _, after = rest.partition("]")
    digits = _DIGITS.match(name, len(before))
    if digits is None or not name.startswith(before):
        return False

    # Digits may follow the bracket, too: each beginning of the number is tried.
    ends = range(digits.start() + 1, digits.end() + 1)
    return any(_is_among(name[len(before) : end], ranges) and _is_one(after, name[end:]) for end in ends)


def _is_among(number: str, ranges: str) -> bool:
    return any(_is_between(number, *_ends(each)) for each in ranges.split(","))


def _ends(text: str) -> tuple[str, str]:
    low, dash, high = text.partition("-")
    return low, high if dash else low


def _is_between(number: str, low: str, high: str) -> bool:
    """Return whether a number is in a range, whose numbers have at least as many digits as its first one."""
    if not (low.isdecimal() and high.isdecimal()):
        return False

    return number == f"{int(number):0{len(low)}}" and int(low) <= int(number) <= int(high)
