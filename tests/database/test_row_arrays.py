"""Rows of several arrays in one."""

from __future__ import annotations

import numpy as np

from traceml.database.row_arrays import join_rows, rows_by
from traceml.database.schema import STEPS


def rows(*steps: int) -> np.ndarray:
    made = np.zeros(len(steps), STEPS.dtype)
    made["step"] = steps
    return made


def test_rows_follow_each_other_in_the_order_of_their_parts() -> None:
    joined = join_rows([rows(3, 4), rows(), rows(1)])
    assert joined.dtype == STEPS.dtype
    assert joined["step"].tolist() == [3, 4, 1]


def test_every_second_row_of_a_part_is_taken_as_it_is_seen() -> None:
    assert join_rows([rows(0, 1, 2, 3)[::2], rows(9)])["step"].tolist() == [0, 2, 9]


def test_joined_rows_are_a_copy_that_can_be_written_to() -> None:
    part = rows(1)
    join_rows([part])["step"][0] = 7
    assert part["step"][0] == 1


def test_parts_of_different_columns_have_the_columns_of_numpy() -> None:
    narrow, wide = np.ones(1, [("a", "<i4")]), np.full(1, 2, [("a", "<i8")])
    assert join_rows([narrow, wide])["a"].tolist() == [1, 2]


def test_rows_are_divided_by_the_numbers_of_a_column() -> None:
    divided = [(step, len(own)) for step, own in rows_by(rows(5, 2, 5), "step")]
    assert divided == [(2, 1), (5, 2)]
    assert not list(rows_by(rows(), "step"))
