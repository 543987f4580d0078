"""The row layout stands in the schema alone: no other module spells out shifts, masks, slots or sizes of rows."""

from __future__ import annotations

import ast
import mmap
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.source_tree import SOURCE, nodes_of, source_files
from traceml.database.flight.row_rings import Ring
from traceml.database.schema import OPEN_SLOTS, STEPS, Phase, Slot

# Layouts of other formats: event columns of traces, the header of .pyc files, slots of a tracker.
_OTHER_FORMATS = ("traces/", "launch/", "track/backends/", "database/schema.py")
_SHIFTS, _MASKS = {16, 32}, {0xFFFF, 0x7FFFFFFF}
_SLOTS = re.compile(r"(^|_)slots$")


def _is_number(node: ast.expr, numbers: set[int] | None = None) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is int and (numbers is None or node.value in numbers)


def _literals(path: Path) -> Iterator[str]:
    for node in nodes_of(path, ast.BinOp, ast.Subscript):
        if isinstance(node, ast.BinOp):
            shift = isinstance(node.op, ast.LShift | ast.RShift) and _is_number(node.right, _SHIFTS)
            mask = isinstance(node.op, ast.BitAnd) and _is_number(node.right, _MASKS)
            if mask or (shift and not _is_number(node.left)):
                yield ast.unparse(node)
        elif _is_number(node.slice):
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
            if _SLOTS.search(name):
                yield ast.unparse(node)


def test_no_other_module_spells_out_the_layout() -> None:
    """Shifts and masks of `bits`, and numbers of open slots, come from the schema by name."""
    found = {
        str(path.relative_to(SOURCE)): list(_literals(path))
        for path in source_files()
        if not str(path.relative_to(SOURCE)).startswith(_OTHER_FORMATS)
    }

    assert {name: literals for name, literals in found.items() if literals} == {}


def test_phases_leave_room_before_the_other_slots() -> None:
    """A new phase takes the next slot, and moves none of the others."""
    assert [int(phase) for phase in Phase] == list(range(len(Phase)))
    assert len(Phase) <= min(Slot)
    assert max(Slot) < OPEN_SLOTS


def test_a_row_of_some_columns_has_zeros_in_the_others() -> None:
    """Values go to the columns that were named, whatever lies between them."""
    row = bytearray(b"\xff" * STEPS.row_bytes)

    STEPS.partial_struct("step", "forward_ns", "backward_own_ns").pack_into(row, 0, 7, 8, -1)

    named = dict(zip(STEPS.names, STEPS.struct.unpack(row), strict=True))
    assert named == dict.fromkeys(STEPS.names, 0) | {"step": 7, "forward_ns": 8, "backward_own_ns": -1}


@pytest.mark.parametrize("names", [("forward_ns", "step"), ("step", "unknown_ns")])
def test_columns_of_a_partial_row_must_exist_in_order(names: tuple[str, ...]) -> None:
    """A column that was moved or removed is noticed when the appender is made, not in the rows."""
    with pytest.raises(ValueError, match=names[1]):
        STEPS.partial_struct(*names)


def test_an_appender_writes_what_append_writes() -> None:
    """A row by an appender is the row with zeros in place of the columns that were left out."""
    rings = [Ring(STEPS, _map(), 0, 4, memoryview(bytearray(64)).cast("q"), 0) for _ in range(2)]

    rings[0].appender("step", "total_ns")(3, 5)
    rings[1].append(*(3 if name == "step" else 5 if name == "total_ns" else 0 for name in STEPS.names))

    assert rings[0].read_from(0) == rings[1].read_from(0)
    assert rings[0].read_from(0).n == 1


def _map() -> mmap.mmap:
    return mmap.mmap(-1, 4096)
