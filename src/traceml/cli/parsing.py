"""Parsing of a command's words, with errors of one line and a hint."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from types import UnionType
from typing import Annotated, Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from traceml.errors import UsageError

__all__ = ["CommandParser", "parse"]

T = TypeVar("T")

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_MISSING = re.compile(r"^[│|]? {5,6}(\S+)", re.MULTILINE)  # their explanations stand further in
_NO_NUMBER = re.compile(
    r"error parsing (\S+): no type matching \{None\}\|(FLOAT|INT) could be instantiated from \[(.*)\]"
)
_FRAME = re.compile(r"[─-╿]|^\s*\|\s|\s\|\s*$|^\s*[+-]{3,}.*$")


class CommandParser(argparse.ArgumentParser):
    """For commands whose words tyro cannot tell apart; its errors are `UsageError`s, as everywhere."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong instead of printing it."""
        raise UsageError(message)


def parse(options: type[T], argv: list[str], *, prog: str) -> T:
    """Return an instance of the dataclass `options` filled from `argv`; `--help` prints and exits with 0.

    Raises:
        UsageError: what is wrong with the words, in one line, with what was perhaps meant.
    """
    import tyro

    options.__annotations__ = {
        name: _quick(hint) for name, hint in get_type_hints(options, include_extras=True).items()
    }
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(options, prog=prog, args=argv, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as leaving:
        if not leaving.code:
            raise

        raise UsageError(_one_line(complaint.getvalue())) from None


def _quick(hint: Any) -> Any:
    """Return a type with `X | None` in its old form: for the new one tyro imports typeguard, which takes 45 ms."""
    if isinstance(hint, UnionType):
        return Union[get_args(hint)]  # noqa: UP007

    if get_origin(hint) is Annotated:
        plain, *notes = get_args(hint)
        return Annotated[(_quick(plain), *notes)]

    return hint


def _one_line(box: str) -> str:
    """Reduce the box which tyro draws around an error to what went wrong and what was perhaps meant.

    tyro has no public way to take the text; its hooks are private and change with each version. The box is
    a title, the message, a line, suggestions, a line, the reference to --help.
    """
    plain = [_FRAME.sub("", _ANSI.sub("", line)).strip() for line in box.splitlines()]
    parts = _paragraphs(plain[1:])  # the first line is the frame with the title
    message = " ".join(parts[0]).rstrip(".: ") if parts else "cannot understand the arguments"
    message = message[:1].lower() + message[1:]
    if message.startswith("missing from "):
        names = _MISSING.findall(_ANSI.sub("", box).partition("For full help")[0])
        return f"{message.partition(':')[0]}: {', '.join(names)}"

    message = _NO_NUMBER.sub(r"\1 takes a number, not \3", message)
    meant = next((part[1] for part in parts if part[0].startswith("Perhaps you meant") and len(part) > 1), None)
    return f"{message}; did you mean {meant}?" if meant else message


def _paragraphs(lines: list[str]) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    for line in lines:
        if line:
            groups[-1].append(line)
        elif groups[-1]:
            groups.append([])

    return [group for group in groups if group]
