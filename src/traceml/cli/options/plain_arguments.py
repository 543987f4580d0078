"""Reading of usual arguments without tyro, whose import and parser take longer than many a command.

Whatever is not surely what tyro would accept is left to it: help, mistakes, aliases, abbreviations, options of several
words. So the meaning of the options, and the text of every error, stay tyro's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from traceml.cli.options.number_range import NumberRange

__all__ = ["plain_hints", "read_plain"]

T = TypeVar("T")

_WORDS = tuple[str, ...]
_NUMBER = {int: re.compile(r"\d{1,18}", re.ASCII), float: re.compile(r"\d{1,15}(\.\d{1,15})?", re.ASCII)}


class _LeftToTyroError(Exception):
    """An argument that tyro has to read."""


class _PositionalMark:
    """In place of `tyro.conf.Positional`."""

    def __class_getitem__(cls, kind: Any) -> Any:
        return Annotated[kind, cls]


class _ArgumentNote:
    """In place of `tyro.conf.arg(...)`."""

    def __init__(self, *, metavar: str, aliases: list[str] | None = None) -> None:
        self.metavar, self.aliases = metavar, aliases  # an alias is left to tyro


_TYRO = SimpleNamespace(conf=SimpleNamespace(Positional=_PositionalMark, arg=_ArgumentNote))


def plain_hints(options: type[Any]) -> dict[str, Any]:
    """Return the types of a dataclass of options, with marks in place of tyro's."""
    return get_type_hints(options, localns={"tyro": _TYRO}, include_extras=True)


def read_plain(options: type[T], argv: list[str], hints: Mapping[str, Any]) -> T | None:
    """Return an instance of the dataclass `options` filled from `argv`; None where tyro has to read it.

    Args:
        hints: of `plain_hints`.
    """
    known = {field.name: field for field in fields(options)}  # type: ignore[arg-type]
    try:
        positional = [name for name, hint in hints.items() if _PositionalMark in _notes(hint)]
        values, words = _options(argv, known, hints, positional)
        if words:
            values[positional[0]] = _of_words(hints[positional[0]], words)
    except _LeftToTyroError:
        return None

    missing = any(field.default is MISSING and name not in values for name, field in known.items())
    return None if missing or len(positional) > 1 else options(**values)


def _options(
    argv: list[str], known: Mapping[str, Field[Any]], hints: Mapping[str, Any], positional: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """Return the values of options, and the words that belong to none, which must be together."""
    values, words = dict[str, Any](), list[str]()
    rest, ended = iter(argv), False
    for word in rest:
        if not word.startswith("-"):
            if ended or not positional:
                raise _LeftToTyroError

            words.append(word)
            continue

        ended = bool(words)
        option, equals, text = word.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--") or "_" in option or name not in known or name in (*values, *positional):
            raise _LeftToTyroError

        values[name] = _of_option(hints[name], known[name].default, text if equals else None, rest)

    return values, words


def _of_option(hint: Any, default: Any, text: str | None, rest: Iterator[str]) -> Any:
    """Return the value of an option: its `text` behind an equals sign, or the next word of the rest."""
    kind, optional = _kind(hint)
    if kind is bool:
        if text is not None or default is not False:
            raise _LeftToTyroError

        return True

    value = next(rest, "") if text is None else text
    if not value or value.startswith("-"):
        raise _LeftToTyroError

    return _value(kind, value, optional=optional)


def _of_words(hint: Any, words: list[str]) -> Any:
    kind, optional = _kind(hint)
    if kind == _WORDS:
        return tuple(words)

    if len(words) > 1:
        raise _LeftToTyroError

    return _value(kind, words[0], optional=optional)


def _value(kind: Any, text: str, *, optional: bool) -> Any:
    """Return the value of a text; where None is a value, tyro reads its name as such."""
    if (kind is str and not (optional and text == "None")) or (get_origin(kind) is Literal and text in get_args(kind)):
        return text

    if kind in _NUMBER and _NUMBER[kind].fullmatch(text):
        return kind(text)

    raise _LeftToTyroError


def _notes(hint: Any) -> tuple[Any, ...]:
    return get_args(hint)[1:] if get_origin(hint) is Annotated else ()


def _kind(hint: Any) -> tuple[Any, bool]:
    """Return the type of an option's value, and whether None is one too.

    Raises:
        _LeftToTyroError: it has notes that only tyro understands.
    """
    for note in _notes(hint):
        if note is not _PositionalMark and not isinstance(note, _ArgumentNote | NumberRange):
            raise _LeftToTyroError

    plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if get_origin(plain) not in (Union, UnionType):
        return plain, False

    kinds = [each for each in get_args(plain) if each is not NoneType]
    return (kinds[0] if len(kinds) == 1 else None), True
