"""Use of the process group, from the rows of a run."""

from __future__ import annotations

import numpy as np

from traceml.database.schema import INFO, STEPS
from traceml.database.store.reader import StoreReader
from traceml.diagnosis.facts.trainings.group_use import GroupUse

__all__ = ["read_group_use"]


def read_group_use(reader: StoreReader) -> GroupUse:
    """Return the use of the process group; steps are read until one of them decides it.

    Raises:
        StoreError: the store cannot be read.
        KeyError: a column is missing.
    """
    use = GroupUse()
    for _, row in reader.log_rows(INFO.name):
        use.info(row)

    frames = reader.frames(STEPS.name)
    while use.is_unused and (frame := next(frames, None)) is not None:
        use.steps(np.frombuffer(frame.data, reader.dtype(STEPS.name)))

    return use
