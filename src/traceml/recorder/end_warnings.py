"""Warnings at the end of a rank: rows that are not stored."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from traceml.database.flight.flight_owner import ROWS_KEPT_S, USER_ROWS_KEPT_S
from traceml.formatting import count_text, plural

if TYPE_CHECKING:
    from traceml.database.flight.flight import FlightFile
    from traceml.recorder.sending.row_sender import RowSender

__all__ = ["end_warnings"]


def end_warnings(
    flight: FlightFile, sender: RowSender, *, stored: bool, supervised: bool, local: bool
) -> Iterator[str]:
    """Yield warnings about rows that were overwritten, and about rows that wait in the flight file.

    Args:
        stored: whether everything is stored.
        supervised: whether a launcher stores what is left.
        local: whether the process starts an aggregator itself; the sender's trouble is then why there is none.
    """
    steps, lost = flight.ring("steps"), sender.steps_lost
    if lost:
        yield (
            f"{count_text(lost)} of {plural(steps.appended, 'step')} are lost: they were overwritten before an "
            f"aggregator could store them. A rank keeps {plural(steps.capacity, 'step')}; TRACEML_RING_ROWS sets the "
            "number."
        )

    # An aggregator that is only slow reads the file itself, when the rank is gone.
    waiting = 0 if supervised or not sender.trouble else sender.steps_waiting
    if stored or not (waiting or flight.holds_user_rows):
        return

    if not sender.connections and not flight.holds_user_rows:
        remedy = "" if local else " Start one first with `traceml serve`, or call traceml.init(local=True)."
        yield (
            f"{plural(waiting, 'step')} of this rank {'is' if waiting == 1 else 'are'} not stored, as no aggregator "
            f"answered ({sender.trouble}).{remedy}"
        )
        return

    what = [plural(waiting, "step")] if waiting else []
    what += ["logged rows"] if flight.holds_user_rows else []
    why = f" ({sender.trouble})" if sender.trouble else ""
    if flight.path is None:
        yield (
            f"{' and '.join(what)} of this rank may be lost: they are not known to be stored{why}, and there was no "
            "place for a flight file that keeps them."
        )
        return

    until_s = time.time() + (USER_ROWS_KEPT_S if flight.holds_user_rows else ROWS_KEPT_S)
    until = time.strftime("%Y-%m-%d %H:%M" if flight.holds_user_rows else "%H:%M", time.localtime(until_s))
    yield (
        f"{' and '.join(what)} of this rank are not stored yet{why}. They are kept in {flight.path} at least until "
        f"{until}: `traceml sync`, or `traceml serve` in this folder, stores them."
    )
