"""One list of hot fields: those that the clock declares, C and its stub have, and hooks in Python share as cells."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from types import GetSetDescriptorType, MemberDescriptorType

import pytest

import traceml.instrument
from traceml.instrument.clock_implementations import CellClock, CellField
from traceml.instrument.divided_step import DividedStep
from traceml.instrument.native.extension import extension
from traceml.instrument.phase_timer import PhaseTimer
from traceml.instrument.step_clock import StepClock

FOLDER = Path(traceml.instrument.__file__).parent
STUB = FOLDER / "native" / "_hot_path.pyi"
_FUNCTION = re.compile(r"\bCallable\b")
DECLARED = {
    name
    for cls in (PhaseTimer, DividedStep, StepClock)
    for name, kind in cls.__annotations__.items()
    if not _FUNCTION.search(kind)
}
CELLS = {name for name, value in vars(CellClock).items() if isinstance(value, CellField)}
# Hooks in Python read them as attributes, if at all: they are not used in each step.
ATTRIBUTES = {"rare_times", "inspects", "failure", "failed_in"}


def test_hooks_in_c_have_the_fields() -> None:
    """A field that C lacks would be one of Python alone, which the hooks do not see."""
    native = extension()
    if native is None:
        pytest.skip("the hooks in C are not built: install the package with a compiler and Python's headers")

    members = {name: value for name, value in vars(native.HotFields).items() if not name.startswith("__")}
    kinds = (MemberDescriptorType, GetSetDescriptorType)

    assert {name for name, value in members.items() if isinstance(value, kinds)} == DECLARED


def test_the_stub_has_the_fields() -> None:
    """mypy knows what C has."""
    tree = ast.parse(STUB.read_text(encoding="utf-8"))
    (hot_fields,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "HotFields"]
    named = [node for node in hot_fields.body if isinstance(node, ast.AnnAssign)]

    assert {
        ast.unparse(each.target) for each in named if not _FUNCTION.search(ast.unparse(each.annotation))
    } == DECLARED


def test_hooks_in_python_have_the_fields() -> None:
    """A hook that names a field without a cell as its variable would have that variable for itself."""
    assert DECLARED - CELLS == ATTRIBUTES
    assert CELLS <= DECLARED
    for function in _functions():
        inside = list(ast.walk(function))
        if any(isinstance(each, ast.Call) and ast.unparse(each.func) == "clock.bind" for each in inside):
            assert {name for each in inside if isinstance(each, ast.Nonlocal) for name in each.names} <= CELLS
            assert {each.id for each in inside if isinstance(each, ast.Name)} & ATTRIBUTES == set()


def _functions() -> Iterator[ast.FunctionDef]:
    """Yield the functions of the modules that share fields."""
    for path in FOLDER.rglob("*.py"):
        if "clock.bind(" in (text := path.read_text(encoding="utf-8")):
            yield from (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
