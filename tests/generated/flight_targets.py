"""Damaged flight files and journals."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import msgpack
from hypothesis import strategies as st

from tests.generated.targets import DAMAGE, Damage, Target, refusal
from traceml.aggregator.ingest import Ingest
from traceml.aggregator.live_rows import LiveRows
from traceml.aggregator.recovery import DeadFlight, recover
from traceml.aggregator.streams.stream import Incarnation, RankStream
from traceml.clock import boot_id
from traceml.database.flight.flight import FlightFile
from traceml.database.flight.flight_header import DATA_AT
from traceml.database.flight.flight_owner import is_alive, remove_stale, waiting_steps
from traceml.database.flight.journal import Journal, read_journal
from traceml.database.flight.postmortem import flight_identity, read_flight
from traceml.database.flight.row_rings import RowSlice
from traceml.database.schema import LOGS, PACKED, Phase, Slot
from traceml.database.store.reader import StoreReader, StreamIdentity
from traceml.database.store.store import StoreWriter
from traceml.errors import StoreError
from traceml.run_folder import STORE_NAME

__all__ = ["TARGETS"]

_NAME = "77-88-abcdef01.flight"


@cache
def _flight() -> bytes:
    """Return a small flight file of a rank that died in a step."""
    capacities = {table.name: 8 for table in PACKED} | {log.name: 2048 for log in LOGS}
    identity = {"rank": 0, "world_size": 1, "job": "job", "host": "here", "run_dir": "/runs/20260101-000000-a-abcd"}
    with TemporaryDirectory() as folder:
        flight = FlightFile.create(Path(folder, "f"), identity, capacities=capacities)
        for number in range(6):
            flight.ring("evals").append(number, 1, 2, 3, 0, 0)
            flight.log("names").append({"id": number, "name": f"phase {number}"})
            flight.log("info").append({"number": number})

        flight.open_slots[Slot.STEP], flight.open_slots[Slot.STEP_START] = 5, 100
        flight.open_slots[Phase.USER], flight.open_slots[Slot.USER_NAME] = 120, 2
        flight.close(unlink=False)
        assert flight.path is not None
        return flight.path.read_bytes()


def _planted(folder: Path, data: bytes) -> Path:
    place = folder / "flights"
    place.mkdir(mode=0o700)
    path = place / _NAME
    path.touch(mode=0o600)
    path.write_bytes(data)
    return path


def _read_everything(path: Path) -> None:
    image = read_flight(path)
    repr(image)
    _ = (image.clock, image.last_beat_s, image.dead_since_s, image.state, image.same_boot, image.open_phase)
    _ = (image.is_evaluating, image.crash_text, image.open_user_phase, image.open_step, image.holds_user_rows)
    for name in image.tables:
        image.counters(name)
        list(image.read_all(name))

    list(image.all_maps("names"))
    with suppress(ValueError, TypeError):  # as its callers do
        DeadFlight(path, image)


def _damaged_flight(damage: Damage, folder: Path) -> None:
    """A damaged file is read as far as it goes or refused, by every reader."""
    path = _planted(folder, damage.of(_flight()))
    assert isinstance(refusal(lambda: _read_everything(path)), StoreError | None)
    flight_identity(path)
    is_alive(path)
    waiting_steps(folder / "runs" / "run")
    remove_stale(path.parent)


def _recovered(damage: Damage, folder: Path) -> None:
    """The aggregator takes what is whole of a damaged file, and goes on."""
    path = _planted(folder, damage.of(_flight()))
    with StoreWriter(folder / STORE_NAME) as store:
        live = LiveRows(1)
        ingest = Ingest(store, live, lambda _paused: None)
        stream = RankStream(1, 0, 0, Incarnation("here", boot_id(), 77, 88, "r0"), flight=str(path))
        store.stream(StreamIdentity(0, 0, "here", 77, 88, "r0"))
        live.join(stream)
        recover(stream, ingest, folder)
        ingest.commit(force=True)

    first, is_shorter = damage.first_change(_flight()), len(damage.of(_flight())) < len(_flight())
    with StoreReader(folder / STORE_NAME) as reader:
        if first >= _end_of_evals() and not is_shorter:
            assert reader.stored("evals") == 6

        list(reader.frames("evals"))
        reader.log_rows("names")


@cache
def _end_of_evals() -> int:
    """Return where the rows of `evals` end; what lies behind has no influence on them, unless the file was cut."""
    layout = msgpack.unpackb(_flight()[12288:DATA_AT].rstrip(b"\0"), strict_map_key=False)
    name, offset, capacity, row_bytes, _ = next(each for each in layout if each[0] == "evals")
    assert name == "evals"
    return int(offset + capacity * row_bytes)


_SLICES = [RowSlice(number * 3, 3, bytes([number]) * 144) for number in range(6)]


@cache
def _journal() -> bytes:
    with TemporaryDirectory() as folder:
        journal = Journal(Path(folder, "j", "a.metrics.journal"))
        for each in _SLICES:
            journal.append(*each)

        journal.close(unlink=False)
        return journal.path.read_bytes()


def _damaged_journal(damage: Damage, folder: Path) -> None:
    """Records before the damage come back as they were, and nothing that was not written."""
    good = _journal()
    path = folder / "a.metrics.journal"
    path.touch(mode=0o600)
    path.write_bytes(damage.of(good))
    found = list(read_journal(path))
    whole = damage.first_change(good) // (len(good) // len(_SLICES))
    assert found[:whole] == _SLICES[:whole]
    assert all(each in _SLICES for each in found)


_HEADER_DAMAGE = st.lists(
    st.tuples(
        st.sampled_from(["put", "word", "word"]),
        st.one_of(st.integers(0, 1024), st.integers(4096, 4300), st.integers(12288, 13500)),
        st.binary(min_size=1, max_size=8),
        st.sampled_from([0, 1, -1, 40, 1 << 20, 1 << 40, 1 << 62, -(1 << 63), (1 << 63) - 1]),
    ),
    min_size=1,
    max_size=3,
).map(lambda edits: Damage(tuple(edits)))
_ANY = st.one_of(DAMAGE, _HEADER_DAMAGE)
TARGETS = (
    Target("flight file", _ANY, _damaged_flight, 50),
    Target("recovery of a flight file", _ANY, _recovered, 30),
    Target("journal", DAMAGE, _damaged_journal, 60),
)
