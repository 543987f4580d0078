"""Damaged stores, and stores with damaged frames; states of deliveries."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from dataclasses import asdict
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgpack
from hypothesis import strategies as st

from tests.generated.targets import DAMAGE, Damage, Target, refusal
from traceml.database.schema import EVALS, METRICS, STEPS
from traceml.database.store.reader import StoreReader, StreamIdentity
from traceml.database.store.store import StoreWriter
from traceml.errors import StoreError
from traceml.run_folder import STORE_NAME
from traceml.runs.find import describe_run, list_runs
from traceml.runs.remove import is_delivered
from traceml.track.delivery.record_reader import RecordReader
from traceml.track.tracker_state import TrackerState, states_of

__all__ = ["TARGETS"]

_FRAMES = 4
_RUN = {"id": "20260101-000000-a-abcd", "name": "a", "started": 1.7e9, "ended": 1.7e9 + 5, "world_size": 1}


def _rows(first: int) -> bytes:
    return b"".join(EVALS.struct.pack(number, 1, 2, 3, 0, 0) for number in range(first, first + 4))


@cache
def _store() -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder, STORE_NAME)
        with StoreWriter(path) as writer:
            stream = writer.stream(StreamIdentity(0, 0, "here", 100, 5), state="finished")
            writer.put_meta("run", _RUN)
            for number in range(_FRAMES):
                writer.append(stream, "evals", number * 4, 4, _rows(number * 4))
                writer.append(stream, "info", number, 1, msgpack.packb({"number": number}))
                writer.append(stream, "steps", number * 2, 2, bytes(2 * STEPS.row_bytes), number * 2, number * 2 + 1)
                writer.event("verdict", {"findings": [{"kind": "HEALTHY"}]})
                writer.commit(number * 100.0)

        return path.read_bytes()


def _read_all(path: Path, damaged: list[str] | None) -> None:
    with StoreReader(path, damaged.append if damaged is not None else None) as reader:
        reader.meta()
        reader.streams()
        reader.events()
        for table in reader.tables:
            list(reader.frames(table))
            reader.stored(table), reader.lost(table), reader.thinned(table)

        reader.rows("evals")
        reader.rows("steps", last=3)
        reader.log_rows("info")
        reader.step_sums()
        list(reader.step_frames("steps", [(1, 5)]))


def _continue(path: Path) -> None:
    with StoreWriter(path) as writer:
        stream = writer.stream(StreamIdentity(0, 0, "here", 100, 5))
        after = writer.next_seq(stream, "evals")
        writer.append(stream, "evals", after, 4, _rows(after))
        writer.commit(1e6)
        writer.maintain(0.01, now_s=1e6)


def _damaged_file(damage: Damage, folder: Path) -> None:
    """A damaged store is read as far as it goes or refused; the list of runs has it in any case."""
    run_dir = folder / "run"
    run_dir.mkdir()
    path = run_dir / STORE_NAME
    path.write_bytes(damage.of(_store()))
    for damaged in (None, []):
        assert isinstance(refusal(lambda damaged=damaged: _read_all(path, damaged)), StoreError | None)

    describe_run(run_dir)
    list_runs(folder)
    is_delivered(run_dir)
    assert isinstance(refusal(lambda: _continue(path)), StoreError | None)


_COLUMNS = ("data", "codec", "n", "seq", "stream", "first_step", "last_step")
_INTEGERS = st.one_of(st.integers(-3, 9), st.integers(-(2**63), 2**63 - 1))
_STORED = st.one_of(
    st.none().map(lambda _: ""), _INTEGERS, st.text(max_size=5), st.binary(max_size=60), st.floats(allow_nan=False)
)


def _damaged_frame(value: tuple[int, str, Any], folder: Path) -> None:
    """A frame of any values is left out or refused; all others are read."""
    frame, column, stored = value
    path = folder / STORE_NAME
    path.write_bytes(_store())
    with closing(sqlite3.connect(path)) as database:
        ids = [row[0] for row in database.execute("SELECT id FROM frames ORDER BY id")]
        spoiled = ids[frame % len(ids)]
        database.execute(f"UPDATE frames SET {column} = ? WHERE id = ?", (stored, spoiled))
        database.commit()

    assert isinstance(refusal(lambda: _read_all(path, None)), StoreError | None)
    damaged: list[str] = []
    if column in ("data", "codec"):
        with StoreReader(path, damaged.append) as reader:
            found = [each.id for table in ("evals", "info", "steps") for each in reader.frames(table)]

        assert set(ids) - {spoiled} <= set(found)


def _damaged_map(value: tuple[str, Any], folder: Path) -> None:
    """Facts of any values stop neither the reader nor the list of runs."""
    place, facts = value
    run_dir = folder / "run"
    run_dir.mkdir()
    path = run_dir / STORE_NAME
    path.write_bytes(_store())
    data = facts if isinstance(facts, bytes) else msgpack.packb(facts)
    statement = {
        "run": "UPDATE meta SET value = ? WHERE key = 'run'",
        "stream": "UPDATE streams SET facts = ?",
        "event": "UPDATE events SET data = ?",
    }[place]
    with closing(sqlite3.connect(path)) as database:
        database.execute(statement, (data,))
        database.commit()

    assert isinstance(refusal(lambda: _read_all(path, [])), StoreError | None)
    describe_run(run_dir)
    assert isinstance(refusal(lambda: _continue(path)), StoreError | None)


_PACKABLE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=6)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["started", "ended", "name", "world_size", "state", "appended", "findings", "x"]),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=6,
)


def _state(value: tuple[dict[str, Any], Damage | None], folder: Path) -> None:
    """The cursor of a delivery is the one that was written, or there is none: it starts over."""
    changes, damage = value
    state = TrackerState("jsonl", cursor={"frame": 3, "row": 1}, delivered=7)
    state.save(folder)
    path = TrackerState.path_in(folder, "jsonl")
    text = json.dumps({**asdict(state), **changes})
    path.write_bytes(damage.of(text.encode()) if damage is not None else text.encode("utf-8", "surrogatepass"))
    found = TrackerState.load(folder, "jsonl")
    for name, kind in (("cursor", dict), ("delivered", int), ("backend", str), ("reached", dict), ("passed", int)):
        assert isinstance(getattr(found, name), kind), f"{name} is {getattr(found, name)!r}"

    found.pending(10)
    found.reach({(1, "metrics"): 3})
    _ = found.is_in_slow_call
    states_of(folder)


def _cursor(value: tuple[list[int], list[tuple[int, bool]]], folder: Path) -> None:
    """However large its batches are and wherever it starts again, a delivery reads each row once, in order."""
    frames, batches = value
    path, written = folder / STORE_NAME, 0
    with StoreWriter(path) as writer:
        stream = writer.stream(StreamIdentity(0, 0, "here", 100, 5))
        names = [{"id": 0, "name": "loss"}, {"id": "odd"}, {"name": 7}]
        writer.append(stream, "names", 0, len(names), b"".join(map(msgpack.packb, names)))
        for number, n in enumerate(frames):
            rows = [METRICS.struct.pack(0, step, 0, 1.0, 0, 0) for step in range(written, written + n)]
            writer.append(stream, "metrics", written, n, b"".join(rows))
            writer.append(stream, "logged", number, 1, msgpack.packb({"kind": "text", "number": number}))
            writer.commit(number * 100.0)
            written += n

    with StoreReader(path) as reader:
        records, cursor = RecordReader(reader), {}
        steps: list[int] = []
        texts: list[int] = []
        for size, starts_again in [*batches, *[(3, False)] * (2 * written + 2 * len(frames) + 2)]:
            records = RecordReader(reader) if starts_again else records
            batch = records.read(cursor, size)
            steps += [each.step for group in batch.metrics for each in group.rows]
            texts += [each.row["number"] for each in batch.logged]
            cursor = json.loads(json.dumps(batch.cursor))

    assert steps == list(range(written))
    assert texts == list(range(len(frames)))


_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=5,
)
_STATE_FIELDS = st.sampled_from([*TrackerState.__dataclass_fields__, "other"])
TARGETS = (
    Target("file of a store", DAMAGE, _damaged_file, 40),
    Target(
        "frame of a store",
        st.tuples(st.integers(0, 20), st.sampled_from(_COLUMNS), _STORED),
        _damaged_frame,
        40,
    ),
    Target(
        "facts in a store",
        st.tuples(st.sampled_from(["run", "stream", "event"]), st.one_of(_PACKABLE, st.binary(max_size=20))),
        _damaged_map,
        40,
    ),
    Target(
        "cursor of a delivery",
        st.tuples(
            st.lists(st.integers(1, 9), min_size=1, max_size=5),
            st.lists(st.tuples(st.integers(1, 12), st.booleans()), max_size=8),
        ),
        _cursor,
        30,
    ),
    Target(
        "state of a delivery",
        st.tuples(st.dictionaries(_STATE_FIELDS, _JSON, max_size=3), st.one_of(st.none(), DAMAGE)),
        _state,
        40,
    ),
)
