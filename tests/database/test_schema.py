"""The tables: one layout for struct, numpy and the hello."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traceml.database.schema import (
    BLOBS,
    LOGS,
    PACKED,
    PHASE_COLUMNS,
    STEPS,
    TABLES,
    Phase,
    Table,
    pack_bits,
    unpack_bits,
)


@pytest.mark.parametrize("table", PACKED, ids=lambda table: table.name)
def test_struct_and_numpy_agree(table: Table) -> None:
    """A row packed in the rank is the row that numpy reads, field by field."""
    values = [number + 0.5 if column.code == "d" else -number for number, column in enumerate(table.columns)]

    packed = table.struct.pack(*values)

    assert len(packed) == table.row_bytes == table.dtype.itemsize == table.struct.size
    assert np.frombuffer(packed, table.dtype)[0].tolist() == tuple(values)
    assert table.layout == [[column.name, column.code] for column in table.columns]
    assert table.capacity & (table.capacity - 1) == 0


def test_names_are_unique_and_documented() -> None:
    """Every table and column has a name of its own and a meaning."""
    assert len(TABLES) == len((*PACKED, *LOGS, BLOBS))
    for table in PACKED:
        names = [column.name for column in table.columns]
        assert len(set(names)) == len(names)
        assert all(column.doc for column in table.columns)


def test_each_phase_has_its_column_in_order() -> None:
    """A phase's value is its place among the step's phase columns."""
    names = [column.name for column in STEPS.columns]

    assert len(PHASE_COLUMNS) == len(Phase)
    assert names[names.index(PHASE_COLUMNS[0]) :][: len(Phase)] == list(PHASE_COLUMNS)


@settings(deadline=None)
@given(micro=st.integers(0, 2**16 - 1), flags=st.integers(0, 2**16 - 1), sequence=st.integers(0, 2**31 - 1))
def test_bits_come_apart_again(micro: int, flags: int, sequence: int) -> None:
    """The three numbers in `bits` do not touch and fit an int64."""
    bits = pack_bits(micro, flags, sequence)

    assert unpack_bits(bits) == (micro, flags, sequence)
    assert 0 <= bits < 2**63
