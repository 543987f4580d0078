"""Rows in which a rank asks its aggregator to read about its code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest

from tests.diagnosis.fabricated import Job, rows_of
from tests.runs.fabricated_store import add_info, add_rank, run_facts
from traceml.aggregator.collecting.source_request import SourceRequest, find_request
from traceml.database.source_reading import SOURCE, SourceReading
from traceml.database.store.store import StoreWriter
from traceml.run_folder import STORE_NAME

ASKED = {"names": ["git", "environment", "my:Collector"], "path": ["/x"], "mask": [], "after_s": 1.0}


def _found(folder: Path, *rows: dict[str, Any], reading: SourceReading | None = None) -> list[str]:
    with StoreWriter(folder / STORE_NAME) as writer:
        writer.put_meta("run", run_facts())
        stream = add_rank(writer, 0, rows_of(Job(steps=5))[0])
        for row in rows:
            if row["kind"] == "collected":
                writer.append(stream, "logged", writer.next_seq(stream, "logged"), 1, msgpack.packb(row))
            else:
                add_info(writer, stream, **row)

        if reading is not None:
            writer.event(SOURCE, reading.to_event())

    return sorted(find_request(folder / STORE_NAME, stream)[1])


def test_built_in_collectors_are_asked_for(tmp_path: Path) -> None:
    """No class that another process names is loaded."""
    assert _found(tmp_path, {"kind": "loader"}, {"kind": "process", "collect": ASKED}) == ["environment", "git"]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"kind": "exit", "code": 0}],
        [{"kind": "process", "folder": "."}],
        [{"kind": "process", "collect": {**ASKED, "names": []}}],
        [{"kind": "process", "collect": ASKED}, *({"kind": "collected", "name": each} for each in ASKED["names"])],
    ],
)
def test_nothing_is_read_where_nothing_is_asked(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    """Ranks that have not told, that read by themselves, or whose settings are against it."""
    assert _found(tmp_path, *rows) == []


@pytest.mark.parametrize(("unread", "names"), [("", []), ("ended", ["environment", "git"])])
def test_what_was_read_whole_is_not_read_again(tmp_path: Path, unread: str, names: list[str]) -> None:
    """An earlier aggregator of the run has read it."""
    assert _found(tmp_path, {"kind": "process", "collect": ASKED}, reading=SourceReading(1, {}, unread)) == names


@pytest.mark.parametrize("collect", [7, {**ASKED, "names": "git"}, {**ASKED, "path": [1]}, {"names": []}])
def test_a_row_of_other_types_is_refused(tmp_path: Path, collect: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        _found(tmp_path, {"kind": "process", "collect": collect})


def _environ_of(pid: int) -> Any:
    row = {"kind": "process", "collect": {**ASKED, "path": []}}
    return json.loads(msgspec.convert(row, SourceRequest).line(["environment"], pid))["config"]["environ"]


def test_variables_are_those_of_the_started_program() -> None:
    """Of a process that was only forked they are not known: the kernel tells those of the one that forked it."""
    code = "import os; pid = os.fork(); print(pid or '', flush=True, end=''); os.read(0, 1)"
    environ = {"OMP_NUM_THREADS": "3", "PATH": os.environ["PATH"]}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as program:
        assert program.stdout is not None
        forked = int(os.read(program.stdout.fileno(), 20))

        assert _environ_of(program.pid)["OMP_NUM_THREADS"] == "3"
        assert _environ_of(forked) is None
        program.communicate(b"xx")

    assert _environ_of(2**22 + 1) is None
