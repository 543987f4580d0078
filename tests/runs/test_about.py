"""Facts of a run besides its rows."""

from __future__ import annotations

import msgpack

from tests.diagnosis.fabricated import Job, rows_of
from tests.runs.fabricated_store import add_info, add_rank, run_facts
from traceml.database.store.reader import StoreReader
from traceml.database.store.store import StoreWriter
from traceml.run_folder import STORE_NAME
from traceml.runs.about import About, about_run


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


def test_a_run_that_reported_nothing(tmp_path):
    """There are empty maps."""
    with StoreWriter(tmp_path / STORE_NAME) as writer:
        writer.put_meta("run", run_facts())

    with StoreReader(tmp_path / STORE_NAME) as reader:
        assert about_run(reader) == About()
