"""Arguments that are read without tyro mean what they mean to tyro."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from typing import Any

import pytest

from traceml.cli import COMMANDS
from traceml.cli.options.parsing import _read_by_tyro
from traceml.cli.options.plain_arguments import plain_hints, read_plain
from traceml.errors import UsageError

_WORDS = [
    "a",
    "b c",
    "",
    "3",
    "-1",
    "+3",
    "007",
    "1_0",
    "2.5",
    "1e3",
    "nan",
    "None",
    "True",
    "x=y",
    "--",
    "-",
    "-h5",
    "λ",
]


def _options() -> list[type[Any]]:
    modules = [import_module(module) for module, _ in COMMANDS.values()]
    return [
        each
        for module in modules
        for name, each in vars(module).items()
        if name.endswith("Options") and each.__module__ == module.__name__ and hasattr(each, "__dataclass_fields__")
    ]


def _some_arguments(chance: random.Random, options: type[Any]) -> list[str]:
    names = [field.name.replace("_", "-") for field in fields(options)]
    values = [*_WORDS, "json", "perfetto", "bash"]
    made = list[str]()
    for _ in range(chance.randrange(5)):
        option = "--" + chance.choice(names)
        kind = chance.randrange(10)
        if kind < 4:
            made += [option, chance.choice(values)]
        elif kind < 6:
            made.append(option)
        elif kind < 7:
            made.append(f"{option}={chance.choice(values)}")
        elif kind < 9:
            made.append(chance.choice(values))
        else:
            made.append(chance.choice([option[:-1], option.replace("-", "_"), "-o", "--no" + option[1:], "--wrong"]))

    return made


@pytest.mark.parametrize("options", _options(), ids=lambda options: options.__name__)
def test_plain_arguments_mean_the_same_to_tyro(options: type[Any]):
    """Random arguments of each command: what is read at all equals what tyro reads."""
    chance = random.Random(options.__name__)
    hints = plain_hints(options)
    for _ in range(60):
        argv = _some_arguments(chance, options)
        plain = read_plain(options, argv, hints)
        if plain is not None:
            try:
                assert plain == _read_by_tyro(options, argv, "traceml thing"), argv
            except UsageError as error:
                pytest.fail(f"tyro refuses {argv}: {error}")


@pytest.mark.process
def test_usual_arguments_of_analyze_need_no_tyro():
    """The import of tyro and its parser would take a fifth of an answer about two million events."""
    code = (
        "import sys; from traceml.cli import analyze; from traceml.cli.options.parsing import parse;"
        "print(parse(analyze.AnalyzeOptions, sys.argv[1:], prog='traceml analyze')); assert 'tyro' not in sys.modules"
    )
    words = ["a.pfw", "b.pfw", "--by", "name,cat", "--top=5", "--json"]

    told = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)

    assert "paths=('a.pfw', 'b.pfw'), by='name,cat'" in told.stdout
    assert "top=5" in told.stdout
    assert "json=True" in told.stdout
