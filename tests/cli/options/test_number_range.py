"""Numeric options: each has a range, and each value outside of it is one clear line."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest

from traceml import cli
from traceml.cli import COMMANDS
from traceml.cli.options.number_range import NumberRange


def _numeric_options() -> Iterator[tuple[str, str, Any]]:
    """Yield (command, option, range) for each numeric option of each command's own parser."""
    for command, (name, _) in COMMANDS.items():
        module = import_module(name)
        if hasattr(module, "make_parser"):
            for action in module.make_parser()._actions:
                if action.type in (int, float) or isinstance(action.type, NumberRange):
                    yield command, action.option_strings[0], action.type
        else:
            options = next(one for one in vars(module).values() if _is_options(one, name))
            for field, hint in typing.get_type_hints(options, include_extras=True).items():
                plain = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
                if {int, float} & {plain, *typing.get_args(plain)}:
                    ranges = [one for one in getattr(hint, "__metadata__", ()) if isinstance(one, NumberRange)]
                    yield command, f"--{field.replace('_', '-')}", ranges[0] if ranges else plain


def _is_options(one: Any, module: str) -> bool:
    return dataclasses.is_dataclass(one) and one.__module__ == module and one.__name__.endswith("Options")


OPTIONS = list(_numeric_options())


def test_every_command_is_looked_at():
    """The commands with numbers are found, of both kinds of parsers."""
    found = {command for command, *_ in OPTIONS}
    assert found == {"demo", "run", "launch", "serve", "profile", "analyze", "compare", "runs"}


@pytest.mark.parametrize(("command", "option", "limits"), OPTIONS)
def test_every_numeric_option_has_a_range(command: str, option: str, limits: Any):
    assert isinstance(limits, NumberRange), f"traceml {command} {option} takes any {limits}"


def _outside(limits: NumberRange) -> list[str]:
    below = limits.minimum if limits.above else limits.minimum - 1
    fraction = ["1.5"] if limits.kind is int else []
    above = [str(limits.maximum + 1)] if limits.maximum < float("inf") else []
    return ["two", "", "nan", "inf", "-7", f"{below:g}", *fraction, *above]


@pytest.mark.parametrize(
    ("command", "option", "text"),
    [(command, option, text) for command, option, limits in OPTIONS for text in _outside(limits)],
)
def test_a_number_outside_of_the_range_is_one_line(command: str, option: str, text: str, capsys):
    """The line names the option and the value, and the command does nothing."""
    positional = {"compare": ["a", "b"], "analyze": ["trace.pfw"], "runs": ["--prune"]}.get(command, [])
    assert cli.main([command, *positional, f"{option}={text}"]) == 2

    out, err = capsys.readouterr()
    line, hint = err.splitlines()
    assert line.startswith(f"traceml {command}: {option} takes a ")
    assert f"not {text!r}" in line or f"not {text}" in line
    assert hint == f"hint: `traceml {command} --help`"
    assert out == ""


@pytest.mark.parametrize(
    ("limits", "text", "value"),
    [
        (NumberRange(), "1", 1),
        (NumberRange(float, minimum=0), "0", 0.0),
        (NumberRange(float, minimum=0, above=True), "0.5", 0.5),
        (NumberRange(minimum=0, maximum=5), "5", 5),
        (NumberRange(words=("gpu",)), "gpu", "gpu"),
    ],
)
def test_a_number_in_the_range_is_taken(limits: NumberRange, text: str, value: object):
    assert limits(text) == value


@pytest.mark.parametrize("nodes", ["0", "x", "2:1", "1:", ":2", "-1", "1:2:3"])
def test_a_wrong_number_of_nodes_is_one_line(nodes: str, capsys):
    """torchrun's nodes are a number or a range."""
    assert cli.main(["run", f"--nnodes={nodes}", "x.py"]) == 2
    assert f"--nnodes takes a whole number of at least 1, or MIN:MAX, not {nodes!r}" in capsys.readouterr().err


def test_a_range_of_nodes_is_taken():
    from traceml.cli.run import make_parser

    assert make_parser().parse_args(["--nnodes", "1:4", "--max_restarts", "2", "x.py"]).max_restarts == 2
    assert isinstance(make_parser(), argparse.ArgumentParser)


@pytest.mark.parametrize(("ranks", "says"), [("2", "the ranks are 0 to 1"), ("1", "there is only rank 0")])
def test_the_slow_rank_of_the_demonstration_exists(ranks: str, says: str, capsys):
    assert cli.main(["demo", "--rank", "7", "--ranks", ranks]) == 2
    assert f"--rank 7 does not exist: {says}; --ranks N makes more" in capsys.readouterr().err
