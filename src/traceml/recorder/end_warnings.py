"""Warnings at the end of a rank: rows that are not stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from traceml.clock import own_time as time
from traceml.database.flight.flight_owner import ROWS_KEPT_S, USER_ROWS_KEPT_S
from traceml.formatting import count_text, plural

if TYPE_CHECKING:
    from traceml.database.flight.flight import FlightFile
    from traceml.recorder.sending.row_sender import RowSender

__all__ = ["lost_text", "waiting_text"]


def lost_text(flight: FlightFile, sender: RowSender) -> str | None:
    """Return a warning about steps that were overwritten before they were stored, if there are any."""
    steps, lost = flight.ring("steps"), sender.steps_lost
    if not lost:
        return None

    return (
        f"{count_text(lost)} of {plural(steps.appended, 'step')} are lost: they were overwritten before an "
        f"aggregator could store them. A rank keeps {plural(steps.capacity, 'step')}; TRACEML_RING_ROWS sets the "
        "number."
    )


def waiting_text(flight: FlightFile, sender: RowSender, *, supervised: bool, local: bool) -> str | None:
    """Return a warning about rows that wait in the flight file; None if an aggregator is only slow to store them.

    Such an aggregator reads the file itself when the rank has closed it.

    Args:
        supervised: whether a launcher stores what is left.
        local: whether the process starts an aggregator itself; the sender's trouble is then why there is none.
    """
    is_read_later = flight.path is not None and (supervised or not sender.trouble)
    waiting = 0 if is_read_later else sender.steps_waiting
    if not (waiting or flight.holds_user_rows):
        return None

    if not sender.connections and not flight.holds_user_rows:
        start = " Start one first with `traceml serve`, or call traceml.init(local=True)."
        why, remedy = (
            ("accepted them", "") if sender.was_answered else ("answered", "" if local or supervised else start)
        )
        return (
            f"{plural(waiting, 'step')} of this rank {'is' if waiting == 1 else 'are'} lost, as no aggregator "
            f"{why} ({sender.trouble.rstrip('.')}).{remedy}"
        )

    what = [plural(waiting, "step")] if waiting else []
    what += ["logged rows"] if flight.holds_user_rows else []
    why = f" ({sender.trouble})" if sender.trouble else ""
    if flight.path is None:
        return (
            f"{' and '.join(what)} of this rank may be lost: they are not known to be stored{why}, and there was no "
            "place for a flight file that keeps them."
        )

    until_s = time.time() + (USER_ROWS_KEPT_S if flight.holds_user_rows else ROWS_KEPT_S)
    until = time.strftime("%Y-%m-%d %H:%M" if flight.holds_user_rows else "%H:%M", time.localtime(until_s))
    return (
        f"{' and '.join(what)} of this rank are not stored yet{why}. They are kept in {flight.path} at least until "
        f"{until}: `traceml sync`, or `traceml serve` in this folder, stores them."
    )
