"""`traceml completion`: completion of commands and options in the shell."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, dataclass, fields
from importlib import import_module
from types import ModuleType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import shtab
import tyro

from traceml import cli
from traceml.cli.options.parsing import option_texts, parse, tyro_hints

__all__ = ["main", "whole_parser"]

_FILES = {"FILE", "FILE.png", "FILE.json", "PATH", "PATH ...", "TRACE.parquet", "META.yaml", "SCRIPT [ARGS ...]"}
_FILES |= {"RUN..."}  # of `traceml compare`, which takes reports, too
_FOLDERS = {"DIR", "[RUN]", "RUN ...", "[RUN ...]", "[RUN|ADDRESS]"}  # a run is given by its folder, too


@dataclass(frozen=True)
class CompletionOptions:
    """Print a script that completes commands, options and files in a shell."""

    shell: Annotated[tyro.conf.Positional[Literal["bash", "zsh", "fish"]], tyro.conf.arg(metavar="SHELL")]
    """bash, zsh or fish."""


def main(argv: list[str]) -> int:
    """Print the script."""
    options = parse(CompletionOptions, argv, prog="traceml completion")
    print(shtab.complete(whole_parser(), shell=options.shell))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """Return a parser of all commands with their public options; it completes, and parses nothing."""
    whole = argparse.ArgumentParser(prog="traceml", description="trace and explain PyTorch training")
    commands = whole.add_subparsers(dest="command")
    for name, (module, help_line) in cli.COMMANDS.items():
        own = _parser_of(name, import_module(module))
        commands.add_parser(name, help=help_line, parents=[own], conflict_handler="resolve")

    return whole


def _parser_of(command: str, module: ModuleType) -> argparse.ArgumentParser:
    """Return the parser of a command: its own, or one made from its dataclass of options."""
    if hasattr(module, "make_parser"):
        made: argparse.ArgumentParser = module.make_parser()
        for each in made._actions:
            _complete(each, str(each.metavar))

        return made

    made = _made(getattr(module, f"{command.title()}Options"))
    if hasattr(module, "EDITS"):  # words of `traceml runs` before a run
        made.add_argument("edit", nargs="?", choices=list(module.EDITS), help="change runs")
        _complete(made.add_argument("runs", nargs="*", help="runs to change"), "RUN ...")

    return made


def _made(options: Any) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    hints, texts = tyro_hints(options), option_texts(options)
    for field in fields(options):
        hint, notes = _plain(hints[field.name])
        known = next((note for note in notes if hasattr(note, "metavar")), None)
        metavar = getattr(known, "metavar", None) or field.name.upper()
        if tyro.conf.Positional in notes or any("Positional" in repr(note) for note in notes):
            added = parser.add_argument(field.name, nargs="*", metavar=metavar, choices=_choices(hint))
        elif hint is bool:
            added = parser.add_argument(_option(field.name), action="store_true")
        else:
            names = [*(getattr(known, "aliases", None) or ()), _option(field.name)]
            nargs = "*" if get_origin(hint) is tuple else None
            added = parser.add_argument(*names, nargs=nargs, metavar=metavar, choices=_choices(hint))

        added.help = texts.get(field.name)
        added.required = field.default is MISSING and bool(added.option_strings)
        _complete(added, metavar)

    return parser


def _plain(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return a type without annotations and None, and its annotations."""
    notes: tuple[Any, ...] = ()
    while get_origin(hint) is Annotated:
        hint, *more = get_args(hint)
        notes += tuple(more)

    if get_origin(hint) in (Union, UnionType):
        kinds = [each for each in get_args(hint) if each is not type(None)]
        if len(kinds) == 1:
            inner, more_notes = _plain(kinds[0])
            return inner, notes + more_notes

    return hint, notes


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _choices(hint: Any) -> list[str] | None:
    return list(get_args(hint)) if get_origin(hint) is Literal else None


def _complete(action: argparse.Action, metavar: str) -> None:
    if metavar in _FILES or metavar in _FOLDERS:
        action.complete = shtab.DIRECTORY if metavar in _FOLDERS else shtab.FILE  # type: ignore[attr-defined]
