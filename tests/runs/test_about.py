"""Facts of a run besides its rows."""

from __future__ import annotations

import msgpack
import pytest

from tests.diagnosis.fabricated import Job, rows_of
from tests.runs.fabricated_store import add_info, add_rank, run_facts
from traceml.database.source_record import SOURCE, SourceReading
from traceml.database.store.reader import StoreReader
from traceml.database.store.store import StoreWriter
from traceml.run_folder import STORE_NAME
from traceml.runs.about import About, about_run
from traceml.runs.report.report import build_report


def _log(writer, stream, **row):
    writer.append(stream, "logged", writer.next_seq(stream, "logged"), 1, msgpack.packb(row))


def test_rank_0_of_the_last_attempt_tells(tmp_path):
    """Program, model, git and parameters come from their rows, the newest attempt first."""
    rows = rows_of(Job(steps=5))
    with StoreWriter(tmp_path / STORE_NAME) as writer:
        writer.put_meta("run", run_facts())
        old = add_rank(writer, 0, rows[0])
        add_info(writer, old, kind="process", python="3.10")
        other = add_rank(writer, 1, rows[1], attempt=1)
        add_info(writer, other, kind="process", python="of rank 1")
        mine = add_rank(writer, 0, rows[0], attempt=1)
        add_info(writer, mine, kind="process", python="3.12", t_ns=5)
        add_info(writer, mine, kind="model", model="Net")
        _log(writer, mine, kind="collected", name="git", facts={"commit": "abc", "dirty": True})
        _log(writer, mine, kind="params", params={"lr": 0.1})
        _log(writer, mine, kind="params", params={"depth": 3})

    with StoreReader(tmp_path / STORE_NAME) as reader:
        about = about_run(reader)

    assert about.process == {"python": "3.12"}
    assert about.model == {"model": "Net"}
    assert about.git == {"commit": "abc", "dirty": True}
    assert about.params == {"lr": 0.1, "depth": 3}


def test_parameters_and_tags_of_the_end_are_known(tmp_path):
    """Behind more texts than are read."""
    with StoreWriter(tmp_path / STORE_NAME) as writer:
        writer.put_meta("run", run_facts())
        stream = add_rank(writer, 0, rows_of(Job(steps=5))[0])
        _log(writer, stream, kind="params", params={"lr": 0.1})
        for epoch in range(200):
            _log(writer, stream, kind="text", name="sample", text=str(epoch))
            writer.commit()

        _log(writer, stream, kind="params", params={"best_epoch": 7})
        _log(writer, stream, kind="tags", tags={"good": ""})

    with StoreReader(tmp_path / STORE_NAME) as reader:
        about = about_run(reader)
        texts = [row["text"] for row in reader.outer_maps("logged", stream, 3) if row["kind"] == "text"]
        everything = list(reader.outer_maps("logged", stream, 150))

    assert about.params == {"lr": 0.1, "best_epoch": 7}
    assert about.tag_texts == ["good"]
    assert (len(texts), texts[:2], texts[-1]) == (len(set(texts)), ["0", "1"], "199")
    assert len(texts) < 10
    assert len(everything) == 203


def test_the_model_is_one_that_is_trained(tmp_path):
    """In the run's facts and in the setup that comparisons read: not a library's module with constants."""
    with StoreWriter(tmp_path / STORE_NAME) as writer:
        writer.put_meta("run", run_facts())
        stream = add_rank(writer, 0, rows_of(Job(steps=5))[0])
        add_info(writer, stream, kind="model", model="Loss", parameters=5, trainable=0)
        add_info(writer, stream, kind="model", model="Net", parameters=900, trainable=900)
        add_info(writer, stream, kind="model", model="Other", parameters=700, trainable=700)

    with StoreReader(tmp_path / STORE_NAME) as reader:
        assert about_run(reader).model["model"] == "Net"

    assert build_report(tmp_path).setup.model["model"] == "Net"


def test_the_loader_is_the_one_that_is_trained_on(tmp_path):
    """In the run's facts and in the setup that comparisons read: not one that was read before it, or has a size."""
    with StoreWriter(tmp_path / STORE_NAME) as writer:
        writer.put_meta("run", run_facts())
        stream = add_rank(writer, 0, rows_of(Job(steps=5))[0])
        add_info(writer, stream, kind="loader", dataset="Validation", batch_size=64, number=0)
        add_info(writer, stream, kind="loader", dataset="Training", batch_size=None, number=2)
        add_info(writer, stream, kind="training_loader", number=3)
        add_info(writer, stream, kind="loader", dataset="Test", batch_size=1, number=4)

    with StoreReader(tmp_path / STORE_NAME) as reader:
        assert about_run(reader).loader["dataset"] == "Training"

    assert build_report(tmp_path).setup.batch_size is None, "its batches are made by a sampler"


def test_the_commit_is_that_of_the_start_where_no_collector_ran(tmp_path):
    """The process has read it; it is no fact of the process then."""
    with StoreWriter(tmp_path / STORE_NAME) as writer:
        writer.put_meta("run", run_facts())
        stream = add_rank(writer, 0, rows_of(Job(steps=5))[0])
        add_info(writer, stream, kind="process", python="3.12", git={"commit": "abc", "branch": "main"})

    with StoreReader(tmp_path / STORE_NAME) as reader:
        about = about_run(reader)

    assert about.process == {"python": "3.12"}
    assert about.git == {"commit": "abc", "branch": "main"}


def _read_on(folder, *readings, asked=None, rank=(), **facts):
    """Return what is known of a run whose rank asks its aggregator to read, and what that has read."""
    with StoreWriter(folder / STORE_NAME) as writer:
        writer.put_meta("run", run_facts())
        stream = add_rank(writer, 0, rows_of(Job(steps=5))[0], started=100.0, **facts)
        collect = {"names": ["git", "environment", "system"], "after_s": 10.0} if asked is None else asked
        add_info(writer, stream, kind="process", git={"commit": "abc"}, collect=collect)
        add_rank(writer, 0, rows_of(Job(steps=5))[0], on_host="h1", helps=True)  # a child that logged
        for row in rank:
            _log(writer, stream, **row)

        for reading in readings:
            writer.event(SOURCE, reading.to_event())

    with StoreReader(folder / STORE_NAME) as reader:
        return about_run(reader)


def test_what_the_aggregator_has_read_is_told(tmp_path):
    """What the rank has read itself counts; names that are no collectors' are left out."""
    read = {"git": {"commit": "def"}, "environment": {"python": "3.12"}, "system": {"cores": 8}, "params": {"lr": 7}}
    mine = {"kind": "collected", "name": "system", "facts": {"cores": 4}}
    about = _read_on(tmp_path, SourceReading(1, {"git": {"commit": "old"}}), SourceReading(1, read), rank=[mine])

    assert about == About(git={"commit": "def"}, environment={"python": "3.12"}, system={"cores": 4})


@pytest.mark.parametrize(
    ("readings", "ended", "unread", "why"),
    [
        ([], 105.0, "git environment system", "the run was shorter than 10 s"),
        ([], 111.0, "git environment system", "the run ended before they were read"),
        ([], None, "git environment system", "they are read when the run is 10 s old"),
        ([SourceReading(7, {"git": {"commit": "of another attempt"}})], 105.0, "git environment system",
         "the run was shorter than 10 s"),
        ([SourceReading(1, {"system": {"cores": 8}}, "ended")], 111.0, "git environment",
         "the run ended before they were read"),
        ([SourceReading(1, {}, "late")], 1000.0, "git environment system", "reading took too long"),
        ([SourceReading(1, {}, "elsewhere")], None, "git environment system", "rank 0 is on another host than the agg"),
        ([SourceReading(1, {}, "a new one")], None, "git environment system", ""),
        ([SourceReading(1, {"environment": {"python": "3"}, "system": {"cores": 8}})], None, "git",
         "git did not answer: it is not installed"),
    ],
)  # fmt: skip
def test_why_something_was_not_read(tmp_path, readings, ended, unread, why):
    """The commit of the start is told nevertheless."""
    about = _read_on(tmp_path, *readings, ended=ended)

    assert about.git == {"commit": "abc"}
    assert " ".join(about.unread) == unread
    assert about.not_read.startswith(why)
    assert bool(about.not_read) == bool(why)


def test_a_center_has_not_what_hosts_have_read(tmp_path):
    """Also where it runs on the host of the rank, or has tried to read."""
    for name, readings in (("quiet", []), ("tried", [SourceReading(1, {}, "elsewhere")])):
        (tmp_path / name).mkdir()
        about = _read_on(tmp_path / name, *readings, ended=105.0, relayed=True)

        assert about.not_read.startswith("they stay with the aggregator on rank 0's host")
        assert about.relayed


@pytest.mark.parametrize("asked", [7, {"names": 7, "after_s": "soon"}, {"names": ["x"]}])
def test_a_request_of_other_types_gives_no_reason(tmp_path, asked):
    assert _read_on(tmp_path, asked=asked, ended=105.0).not_read == ""


def test_what_settings_turn_off_is_not_missing(tmp_path):
    """Nor is git outside a repository."""
    about = _read_on(tmp_path, asked={"names": ["git", "system"], "after_s": 10.0}, ended=105.0)

    assert about.unread == ("git", "system")


def test_a_run_that_reported_nothing(tmp_path):
    """There are empty maps."""
    with StoreWriter(tmp_path / STORE_NAME) as writer:
        writer.put_meta("run", run_facts())

    with StoreReader(tmp_path / STORE_NAME) as reader:
        assert about_run(reader) == About()
