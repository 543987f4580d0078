"""Updates of hosts as bytes, packed as the relay packs them: choices only where they change, rows without sequence."""

from __future__ import annotations

import msgpack

from traceml.database.schema import STEPS
from traceml.database.store.frame_compression import decode, encode
from traceml.diagnosis.merged_hosts.host_merger import HostUpdate
from traceml.diagnosis.steps.representatives import ExcessWork, HostChoice

__all__ = ["UpdatePacker", "unpacked"]


class UpdatePacker:
    """Packs the updates of one host."""

    def __init__(self) -> None:
        self._choice: HostChoice | None = None
        self._number = 0

    def packed(self, update: HostUpdate) -> bytes:
        """Return the next update as bytes."""
        choice = None if update.choice.is_same(self._choice) else update.choice
        self._choice, self._number = choice or self._choice, self._number + 1
        rows = []
        for rank, data in update.rows.items():
            if data:
                codec, compressed = encode(STEPS, data)
                rows.append([rank, STEPS.name, self._number, len(data) // STEPS.row_bytes, int(codec), compressed])

        message = {
            "t": "update", "number": self._number, "rows": rows,
            "choice": None if choice is None else choice.to_row(),
            "above": update.above.to_row() if len(update.above) else None, "ends": [], "sums": None, "events": [],
        }  # fmt: skip
        return bytes(msgpack.packb(message))


def unpacked(data: bytes, before: HostChoice | None) -> HostUpdate:
    """Reverse `UpdatePacker.packed`.

    Args:
        data: the bytes.
        before: the host's last choice.
    """
    message = msgpack.unpackb(data)
    choice = before if message["choice"] is None else HostChoice.from_row(message["choice"])
    assert choice is not None, "the first update has a choice"
    above = ExcessWork() if message["above"] is None else ExcessWork.from_row(message["above"])
    rows = {rank: decode(codec, rows, STEPS.row_bytes) for rank, _, _, _, codec, rows in message["rows"]}
    return HostUpdate(choice, rows, above)
