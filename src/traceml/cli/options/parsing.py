"""Parsing of a command's arguments, with errors of one line and a hint."""

from __future__ import annotations

import argparse
import ast
import contextlib
import inspect
import io
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from traceml.cli.options.examples import examples_text
from traceml.cli.options.number_range import check_ranges
from traceml.cli.options.plain_arguments import plain_hints, read_plain
from traceml.errors import UsageError

if TYPE_CHECKING:
    from traceml.settings import Config

__all__ = ["CommandParser", "WrappingFormatter", "config_over", "option_texts", "parse", "tyro_hints", "wrapped"]

T = TypeVar("T")

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_NO_VALUE = re.compile(r"^argument (?:-\w/)?(--[\w-]+)\S*: expected (?:one argument|at least one \w+)$")
# Before tyro 1.0.14 the name is printed as a tuple: '('--count',)'.
_NO_TYRO_VALUE = re.compile(r"^missing value for argument '(?:\(')?([^\s',]+)(?:',\))?'\. Expected .*$")
_WRONG_VALUE = re.compile(r"^argument (?:-\w/)?(--[\w-]+)\S*: takes")  # an option and its aliases
_MISSING = re.compile(r"^[│|]? {5,6}(\S+)", re.MULTILINE)  # their explanations are indented further
_NOT_A_NUMBER = re.compile(
    r"error parsing (\S+): no type matching \{None\}\|(FLOAT|INT) could be instantiated from \[(.*)\]"
)
_NO_WORDS = re.compile(r"error parsing (\S+): needs a value")
_NO_WORD = re.compile(r"[\w./]+ needs a value$")  # of a positional argument
_NO_CHOICE = re.compile(r"'None', |, 'None'")  # the default of an option, which cannot be given
_NOT_INT = re.compile(r"error parsing (\S+): invalid literal for int\(\) with base 10: (.*)")
_NOT_FLOAT = re.compile(r"error parsing (\S+): could not convert string to float: (.*)")
_FRAME = re.compile(r"[─-╿]|^\s*\|\s|\s\|\s*$|^\s*[+-]{3,}.*$")


class CommandParser(argparse.ArgumentParser):
    """Parser for commands that tyro cannot express; its errors are `UsageError`s, its epilog begins with examples."""

    def __init__(self, *, prog: str, epilog: str = "", **more: Any) -> None:
        super().__init__(prog=prog, epilog="\n\n".join(filter(None, [examples_text(prog), epilog])), **more)

    def error(self, message: str) -> NoReturn:
        """Raise an error instead of printing it."""
        raise UsageError(_WRONG_VALUE.sub(r"\1 takes", _NO_VALUE.sub(r"\1 needs a value", message)))


class WrappingFormatter(argparse.RawDescriptionHelpFormatter):
    """Formatter that wraps sentences to the terminal's width, and leaves examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:  # noqa: ARG002 - argparse calls it
        return wrapped(text, width)


def wrapped(text: str, columns: int) -> str:
    """Wrap the lines of a text that are wider than some columns; indented ones are examples and continue indented."""
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
    hints = plain_hints(options)
    parsed = read_plain(options, argv, hints)
    if parsed is None:
        parsed = _read_by_tyro(options, argv, prog)

    check_ranges(parsed, hints)
    return parsed


def _read_by_tyro(options: type[T], argv: list[str], prog: str) -> T:
    import tyro

    texts = option_texts(options) if {"-h", "--help"} & {*argv} else {}  # it takes milliseconds
    declared = options.__annotations__
    options.__annotations__ = {
        name: Annotated[_light(hint), _explained(texts.get(name))] for name, hint in tyro_hints(options).items()
    }
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), _wrapped_output():
            return tyro.cli(
                options,
                prog=prog,
                description=_description(options, prog),
                args=argv,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as error:
        if not error.code:
            raise

        message = _one_line(output.getvalue())
        unknown = _unknown_options(options, argv) if _NO_WORD.match(message) else ""
        raise UsageError(unknown or message) from None
    finally:
        options.__annotations__ = declared  # completion reads them


def _unknown_options(options: type[Any], argv: list[str]) -> str:
    """Return what tyro says of unknown options; it reports a missing positional argument first."""
    known = {f"--{name}".replace("_", "-") for name in (*options.__annotations__, "help")}
    given = {word.partition("=")[0] for word in argv if word.startswith("--")}
    unknown = sorted(word for word in given if word.replace("_", "-") not in known)
    return f"unrecognized options: {', '.join(unknown)}" if unknown else ""


def tyro_hints(options: type[Any]) -> dict[str, Any]:
    """Return the types of a dataclass of options, whose module need not import tyro."""
    import tyro

    return get_type_hints(options, localns={"tyro": tyro}, include_extras=True)


def option_texts(options: type[Any]) -> dict[str, str]:
    """Return the text below each option as one paragraph; tyro would keep the line breaks of the source."""
    texts: dict[str, str] = {}
    try:
        (declared,) = ast.parse(textwrap.dedent(inspect.getsource(options))).body
    except OSError:  # installed without its source
        return texts

    for option, below in pairwise(declared.body if isinstance(declared, ast.ClassDef) else ()):
        match option, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                texts[name] = " ".join(text.split())

    return texts


def _explained(text: str | None) -> Any:
    """Return the annotation with an option's text, which says what a default means: tyro adds no `(default: ...)`."""
    import tyro

    return tyro.conf.arg(help=text, help_behavior_hint="")


def _description(options: type[Any], prog: str) -> str:
    return "\n\n".join(filter(None, [inspect.cleandoc(options.__doc__ or ""), examples_text(prog)]))


class _HelpText(io.StringIO):
    """Collects a help text, with colors if standard output is a terminal."""

    def isatty(self) -> bool:
        return sys.__stdout__ is not None and sys.__stdout__.isatty()


@contextlib.contextmanager
def _wrapped_output() -> Iterator[None]:
    """Wrap the lines of a help text that are wider than the terminal: tyro wraps options only."""
    collected, columns = _HelpText(), shutil.get_terminal_size().columns
    try:
        with contextlib.redirect_stdout(collected):
            yield
    finally:
        for line in collected.getvalue().splitlines():
            plain = _ANSI.sub("", line)
            print((line if len(plain) <= columns else wrapped(plain, columns)).rstrip())


def _light(hint: Any) -> Any:
    """Return a type for which tyro does not import typeguard, which takes 45 ms of CPU, and asyncio with it.

    `X | None` becomes `Optional`, and `tuple[str, ...]` a tuple with a constructor.
    """
    if isinstance(hint, UnionType):
        return Union[get_args(hint)]  # noqa: UP007

    if get_origin(hint) is Annotated:
        plain, *notes = get_args(hint)
        words = _words_type(notes) if plain == tuple[str, ...] else None
        return Annotated[(words or _light(plain), *notes)]

    return hint


def _words_type(notes: list[Any]) -> Any:
    """Return the type of several words: one or more after an option, also none where they are positional."""
    import tyro

    read: Callable[[list[str]], tuple[str, ...]] = tuple if tyro.conf.Positional in notes else _some_words
    spec = tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="TEXT",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=list,
    )
    return Annotated[tuple, spec]


def _some_words(words: list[str]) -> tuple[str, ...]:
    """Return the words after an option; tyro prints the text of the error."""
    if not words:
        raise ValueError("needs a value")

    return tuple(words)


def _one_line(box: str) -> str:
    """Reduce the box that tyro draws around an error to its message and its suggestion.

    tyro has no public way to get the text; its hooks are private and change with each version. The box has
    a title, the message, a line, suggestions, a line, and the reference to --help.
    """
    plain = [_FRAME.sub("", _ANSI.sub("", line)).strip() for line in box.splitlines()]
    parts = _paragraphs(plain[1:])  # the first line is the frame with the title
    message = " ".join(parts[0]).rstrip(".: ") if parts else "cannot understand the arguments"
    message = message[:1].lower() + message[1:]
    if message.startswith("missing from "):
        names = _MISSING.findall(_ANSI.sub("", box).partition("For full help")[0])
        return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing"

    message = _NO_TYRO_VALUE.sub(r"\1 needs a value", message)
    message = _NO_WORDS.sub(r"\1 needs a value", message)
    message = _NO_CHOICE.sub("", message)
    message = _NOT_A_NUMBER.sub(r"\1 takes a number, not \3", message)
    message = _NOT_INT.sub(r"\1 takes a whole number, not \2", message)
    message = _NOT_FLOAT.sub(r"\1 takes a number, not \2", message)
    suggestion = next((part[1] for part in parts if part[0].startswith("Perhaps you meant") and len(part) > 1), None)
    return f"{message}; did you mean {suggestion}?" if suggestion else message


def _paragraphs(lines: list[str]) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    for line in lines:
        if line:
            groups[-1].append(line)
        elif groups[-1]:
            groups.append([])

    return [group for group in groups if group]


def config_over(runs_dir: str | None) -> Config:
    """Return the settings in force, with another folder of runs where one is given."""
    from traceml.settings import load  # commands without settings do not pay for it

    return load() if runs_dir is None else load(runs_dir=runs_dir)
