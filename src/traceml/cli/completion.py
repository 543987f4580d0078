"""`traceml completion`: completion of commands and options in the shell."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Annotated, Literal

import shtab

from traceml import cli
from traceml.cli.options.parsing import Positional, options_parser, parse

__all__ = ["main", "whole_parser"]

_FILES = {"FILE", "FILE.png", "FILE.json", "PATH", "PATH ...", "TRACE.parquet", "META.yaml", "SCRIPT [ARGS ...]"}
_FILES |= {"RUN..."}  # of `traceml compare`, which takes reports, too
_FOLDERS = {"DIR", "[RUN]", "RUN ...", "[RUN ...]", "[RUN|ADDRESS]"}  # a run is given by its folder, too


@dataclass(frozen=True)
class CompletionOptions:
    """Print a script that completes commands, options and files in a shell."""

    shell: Annotated[Literal["bash", "zsh", "fish"], Positional("SHELL")]
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
    else:
        made = options_parser(getattr(module, f"{command.title()}Options"), f"traceml {command}")
        if hasattr(module, "EDITS"):  # words of `traceml runs` before a run
            made.add_argument("edit", nargs="?", choices=list(module.EDITS), help="change runs")
            made.add_argument("runs", nargs="*", metavar="RUN ...", help="runs to change")

    for action in made._actions:
        if action.metavar in _FILES or action.metavar in _FOLDERS:
            action.complete = shtab.DIRECTORY if action.metavar in _FOLDERS else shtab.FILE  # type: ignore[attr-defined]

    return made
