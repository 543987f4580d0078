"""Exports of damaged and of running runs."""

from __future__ import annotations

import gzip
import sqlite3
from contextlib import closing

import pytest

from tests.database.store.store_writers import erase_newest_frames
from tests.diagnosis.fabricated import Job, rows_of
from tests.runs.export.exported import STEPS, events_in, rich_run
from tests.runs.fabricated_store import add_rank, run_facts, store_run
from traceml.database.store.store import StoreWriter
from traceml.errors import StoreError, UsageError
from traceml.run_folder import STORE_NAME
from traceml.runs.export.exporter import FORMATS, default_path, export_run, format_of
from traceml.traces.query.summary import summarize

OUTPUTS = {"perfetto": "out.json", "pfw": "out.pfw.gz", "parquet": "out", "csv": "out"}


@pytest.mark.parametrize("form", FORMATS)
def test_damaged_frames_are_left_out_and_reported(tmp_path, form):
    """A frame that is garbage costs its rows alone."""
    run_dir = rich_run(tmp_path / "run")
    database = sqlite3.connect(run_dir / STORE_NAME)
    query = "SELECT frames.id, n FROM frames JOIN tables ON tables.id = tbl WHERE name = 'steps' ORDER BY frames.id"
    number, lost = database.execute(query).fetchone()
    database.execute("UPDATE frames SET data = x'00010203' WHERE id = ?", (number,))
    database.commit()
    database.close()

    exported = export_run(run_dir, form, tmp_path / OUTPUTS[form])

    assert exported.steps == 2 * STEPS - lost > 0
    assert [what.split(":")[0] for what in exported.damage] == [f"frame {number} of steps"]


@pytest.mark.parametrize("form", FORMATS)
def test_store_that_lost_its_end_is_reported(tmp_path, form):
    """Frames of which a copied file has only zeros are missing in the export, which says so."""
    run_dir = rich_run(tmp_path / "run")
    erase_newest_frames(run_dir / STORE_NAME)

    exported = export_run(run_dir, form, tmp_path / OUTPUTS[form])

    assert any("not in order" in what for what in exported.damage)


def damage_root(run_dir, page):
    """Overwrite the first page of an index or a table of a run's store."""
    with closing(sqlite3.connect(run_dir / STORE_NAME)) as database:
        (root,) = database.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (page,)).fetchone()
        (size,) = database.execute("PRAGMA page_size").fetchone()

    with (run_dir / STORE_NAME).open("r+b") as file:
        file.seek((root - 1) * size)
        file.write(b"\xff" * size)


@pytest.mark.parametrize("form", ["pfw", "perfetto"])
@pytest.mark.parametrize("page", ["frames_by_table", "thinnings"])
def test_traces_have_the_rows_that_a_damaged_page_hides(page, form, tmp_path):
    """As the tables have."""
    run_dir = rich_run(tmp_path / "run")
    whole = export_run(run_dir, form, tmp_path / "whole")
    damage_root(run_dir, page)

    found = export_run(run_dir, form, tmp_path / "found")

    assert found.damage
    assert whole.steps > 0
    assert (found.steps, found.rows) == (whole.steps, whole.rows)


@pytest.mark.parametrize("page", ["frames_by_table", "thinnings"])
def test_tables_have_the_rows_that_a_damaged_page_hides(page, tmp_path):
    """A page of an index, or of a table beside it, kept an export from all rows after the first few."""
    run_dir = rich_run(tmp_path / "run")
    whole = export_run(run_dir, "csv", tmp_path / "whole")
    damage_root(run_dir, page)

    found = export_run(run_dir, "csv", tmp_path / "found")

    assert found.damage
    assert (found.steps, found.rows) == (whole.steps, whole.rows)
    for table in ("steps", "metrics"):
        lines = [sorted((tmp_path / name / f"{table}.csv").read_text().splitlines()) for name in ("whole", "found")]
        assert lines[0] == lines[1]


@pytest.mark.parametrize("form", FORMATS)
def test_store_that_breaks_off_gives_what_is_before(tmp_path, form):
    """A store with destroyed pages is read as far as possible, or refused as damaged; never silently empty."""
    run_dir = rich_run(tmp_path / "run", steps=2000)
    data = bytearray((run_dir / STORE_NAME).read_bytes())
    middle = len(data) // 32768 // 2 * 32768
    data[middle : middle + 3 * 32768] = b"\xff" * (3 * 32768)
    (run_dir / STORE_NAME).write_bytes(data)

    try:
        exported = export_run(run_dir, form, tmp_path / OUTPUTS[form])
    except StoreError as error:
        assert "damaged" in str(error) or "cannot read" in str(error)  # noqa: PT017 - either is right
        return

    assert len(exported.damage) == len(set(exported.damage)) > 0


@pytest.mark.parametrize("form", FORMATS)
def test_run_that_goes_on_is_exported_as_far_as_it_is(tmp_path, form):
    """While the aggregator writes, an export has the committed rows; a later one has more."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    rows = rows_of(Job(ranks=1, steps=200, grouped=False))[0]
    with StoreWriter(run_dir / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(state="running", ended=None, world_size=1))
        stream = add_rank(writer, 0, rows[:128], state="running")
        writer.commit()
        first = export_run(run_dir, form, tmp_path / OUTPUTS[form])
        writer.append(stream, "steps", 128, 72, rows[128:].tobytes(), 128, 199)
        writer.commit()
        second = export_run(run_dir, form, tmp_path / OUTPUTS[form])

    assert (first.steps, second.steps) == (128, 200)


def test_all_attempts_are_in_one_trace(tmp_path):
    """A restarted job is one time line; its ranks are the same processes."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with StoreWriter(run_dir / STORE_NAME) as writer:
        writer.put_meta("run", run_facts())
        for attempt in (0, 1):
            for rank, rows in enumerate(rows_of(Job(steps=20))):
                rows["t_end_ns"] += attempt * 10**10
                add_rank(writer, rank, rows, attempt=attempt)

    export_run(run_dir, "perfetto", tmp_path / "out.json")
    steps = [event for event in events_in(tmp_path / "out.json") if event.get("name") == "step"]

    assert len(steps) == 80
    assert {event["pid"] for event in steps} == {1, 2}


@pytest.mark.parametrize("form", FORMATS)
def test_run_without_a_step(tmp_path, form):
    """A run without a step is exported too."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with StoreWriter(run_dir / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(world_size=0))

    exported = export_run(run_dir, form, tmp_path / OUTPUTS[form])
    assert (exported.steps, exported.damage) == (0, ())


def test_output_that_cannot_be_written_leaves_nothing(tmp_path):
    """A missing folder is an error, and no draft is left."""
    run_dir = store_run(tmp_path / "run", Job(steps=20))

    with pytest.raises(OSError, match="nowhere"):
        export_run(run_dir, "perfetto", tmp_path / "nowhere" / "out.json")

    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize("form", ["perfetto", "pfw"])
def test_a_name_without_a_known_end_is_taken(tmp_path, form):
    """The format was named, so the file may have any name; .gz compresses, and the content is the same."""
    run_dir = store_run(tmp_path / "run", Job(steps=20))
    contents = []
    for name in (f"a{FORMATS[form][0].removesuffix('.gz')}", "trace", "trace.txt", "trace.gz"):
        assert export_run(run_dir, form, tmp_path / name).files == (tmp_path / name,)
        data = (tmp_path / name).read_bytes()
        contents.append(gzip.decompress(data) if name.endswith(".gz") else data)

    assert len(set(contents)) == 1
    assert b"process_name" in contents[0]


def test_names_and_formats(tmp_path):
    """A trace has no name of another format; where none is given the run's id is taken."""
    with pytest.raises(UsageError, match=r"ends in \.pfw\.gz or \.pfw"):
        export_run(tmp_path, "pfw", tmp_path / "out.json")

    assert [format_of(tmp_path / name) for name in ("a.json", "a.json.gz", "a.pfw", "a.csv", "a.parquet", "a.txt")] == [
        "perfetto", "perfetto", "pfw", "csv", "parquet", None,
    ]  # fmt: skip
    assert [str(default_path(tmp_path / "id", form)) for form in FORMATS] == [
        "id.json", "id.pfw.gz", "id-parquet", "id-csv",
    ]  # fmt: skip


@pytest.mark.parametrize("form", ["perfetto", "csv"])
def test_progress_rises_to_the_end(tmp_path, form):
    """Each part of the store is told once, and the last one is its end."""
    run_dir = store_run(tmp_path / "run", Job(ranks=300, steps=4))
    told: list[tuple[int, int]] = []

    export_run(run_dir, form, tmp_path / f"out.{'json' if form == 'perfetto' else form}", lambda *at: told.append(at))

    assert len(told) > 1
    assert told == sorted(set(told))
    assert told[-1][0] == told[-1][1]


@pytest.mark.parametrize("form", ["perfetto", "pfw"])
def test_events_are_those_that_the_analysis_counts(tmp_path, form):
    """Names of processes and tracks are in the file, and are no events."""
    exported = export_run(rich_run(tmp_path / "run"), form, tmp_path / OUTPUTS[form])

    assert exported.rows == summarize([exported.path], cached=False)["events"]
