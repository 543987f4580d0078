"""Parsing of a command's arguments, with errors of one line and a hint."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    NoReturn,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from traceml.cli.options.examples import examples_text
from traceml.cli.options.number_range import NumberRange
from traceml.errors import UsageError

__all__ = ["CommandParser", "Metavar", "Positional", "options_parser", "parse"]

T = TypeVar("T")
_NO_VALUE = re.compile(r"^argument (?:-\w/)?(--[\w-]+)\S*: expected (?:one argument|at least one \w+)$")
_WRONG_VALUE = re.compile(r"^argument (?:-\w/)?(--[\w-]+)\S*: takes")  # an option and its aliases


class Metavar(NamedTuple):
    """Note in `Annotated` on a field of options: how the help names its value.

    Args:
        short: a second name of the option, such as `-o`.
        one_each: of an option with several values: each follows an option's name of its own, as it may contain spaces.
    """

    text: str
    short: str = ""
    one_each: bool = False


class Positional(Metavar):
    """Note on a field that is given by its place, without the name of an option."""

    __slots__ = ()


class CommandParser(argparse.ArgumentParser):
    """Parser whose errors are `UsageError`s, and whose epilog begins with examples."""

    def __init__(self, *, prog: str, epilog: str = "", allow_abbrev: bool = False, **more: Any) -> None:
        super().__init__(
            prog=prog,
            epilog="\n\n".join(filter(None, [examples_text(prog), epilog])),
            formatter_class=_WrappingFormatter,
            allow_abbrev=allow_abbrev,
            **more,
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the options; an unknown one is an error that names one like it."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.refuse(unknown)

        return found

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """Raise an error about words that no option takes."""
        raise UsageError(_unknown_text(words, list(self._option_string_actions)))

    def error(self, message: str) -> NoReturn:
        """Raise an error instead of printing it."""
        raise UsageError(_WRONG_VALUE.sub(r"\1 takes", _NO_VALUE.sub(r"\1 needs a value", message)))


class _WrappingFormatter(argparse.RawDescriptionHelpFormatter):
    """Formatter that wraps sentences to the terminal's width, and leaves examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:  # noqa: ARG002 - argparse calls it
        return wrapped(text, width)


def wrapped(text: str, columns: int) -> str:
    """Wrap the lines of a text that are wider than some columns; indented ones are examples and continue indented."""
    import textwrap  # as the other imports below: `traceml run`, whose script waits, needs none of them

    lines = []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()))
        more = f"{indent}    " if indent else ""
        lines += textwrap.wrap(line, columns, subsequent_indent=more, break_on_hyphens=False) or [""]

    return "\n".join(lines)


def parse(options: type[T], argv: list[str], *, prog: str) -> T:
    """Return an instance of the dataclass `options` filled from `argv`; `--help` prints and exits with 0.

    Raises:
        UsageError: the arguments are wrong; one line, with a suggestion if there is one.
    """
    from dataclasses import MISSING, fields

    parser = options_parser(options, prog, explained=not {"-h", "--help"}.isdisjoint(argv))
    found, unknown = parser.parse_known_intermixed_args(list(map(_with_hyphens, argv)))
    if unknown:
        parser.refuse(unknown)

    given = {name: value for name, value in vars(found).items() if value is not None}
    labels = {each.dest: each.option_strings[-1] if each.option_strings else each.metavar for each in parser._actions}
    needed = [field.name for field in fields(options) if field.default is MISSING]  # type: ignore[arg-type]
    if missing := [labels[name] for name in needed if name not in given]:
        raise UsageError(f"{' and '.join(map(str, missing))} {'is' if len(missing) == 1 else 'are'} missing")

    return options(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def options_parser(options: type[Any], prog: str, *, explained: bool = True) -> CommandParser:
    """Return the parser of a dataclass of options; it takes none of them for needed, which `parse` checks.

    Args:
        explained: give each option the text below its field, which takes milliseconds to find.
    """
    from inspect import cleandoc, get_annotations

    hints, texts = get_type_hints(options, include_extras=True), _option_texts(options) if explained else {}
    ordered = dict.fromkeys(name for each in options.__mro__ for name in get_annotations(each))  # shared ones last
    arguments = {name: _argument(name, hints[name], texts.get(name)) for name in ordered}
    words = [more["metavar"] for names, more in arguments.values() if not names[0].startswith("-")]
    parser = CommandParser(
        prog=prog,
        usage=" ".join([prog, "[-h] [OPTIONS]", *words]),
        description=cleandoc(options.__doc__ or ""),
    )
    for names, more in arguments.values():
        parser.add_argument(*names, **more)

    return parser


def _argument(name: str, hint: Any, text: str | None) -> tuple[list[str], dict[str, Any]]:
    """Return what `add_argument` takes for a field of options."""
    kind, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    if NoneType in get_args(kind):
        (kind,) = (each for each in get_args(kind) if each is not NoneType)

    note = next((each for each in notes if isinstance(each, Metavar)), None)
    option = f"--{name.replace('_', '-')}"
    more: dict[str, Any] = {"help": text.replace("%", "%%") if text else None}
    if kind is bool:
        return [option], {**more, "action": "store_true"}

    choices = get_args(kind) if get_origin(kind) is Literal else None
    more |= {"metavar": note.text if note else None if choices else kind.__name__.upper(), "choices": choices}
    more["type"] = next((each for each in notes if isinstance(each, NumberRange)), Path if kind is Path else None)
    if isinstance(note, Positional):
        return [name], {**more, "nargs": "*" if kind == tuple[str, ...] else "?"}
    if kind == tuple[str, ...]:  # the values of an option that is given twice are added
        more |= {"action": "append"} if note and note.one_each else {"action": "extend", "nargs": "+"}

    return [*([note.short] if note and note.short else []), option], more


def _option_texts(options: type[Any]) -> dict[str, str]:
    """Return the text below each option as one paragraph."""
    import ast
    import inspect
    import textwrap

    texts: dict[str, str] = {}
    try:
        sources = [inspect.getsource(each) for each in options.__mro__[-2::-1]]
    except OSError:  # installed without its source
        return texts

    declared = [each for source in sources for each in ast.parse(textwrap.dedent(source)).body]
    for option, below in pairwise(part for each in declared if isinstance(each, ast.ClassDef) for part in each.body):
        match option, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                texts[name] = " ".join(text.split())

    return texts


def _with_hyphens(word: str) -> str:
    """Return `--runs-dir` for `--runs_dir`, which torchrun's users write."""
    option, equals, value = word.partition("=")
    return option.replace("_", "-") + equals + value if word.startswith("--") else word


def _unknown_text(words: Sequence[str], known: Sequence[str]) -> str:
    options = [word.partition("=")[0] for word in words if word.startswith("-")]
    if not options:
        return f"unrecognized arguments: {', '.join(words)}"

    from difflib import get_close_matches

    near = [name for name in known if name.startswith(options[0])] or get_close_matches(options[0], known, 1, 0.7)
    return f"unrecognized options: {', '.join(options)}{f'; did you mean {near[0]}?' if near else ''}"
