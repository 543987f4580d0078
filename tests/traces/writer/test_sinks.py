"""Files that blocks of events are appended to."""

from __future__ import annotations

import gzip
import json
import zlib

import pytest

from traceml.errors import UsageError
from traceml.traces.writer import sinks
from traceml.traces.writer.sinks import SUFFIXES, expand_path, sink_of

BLOCKS = (b'{"a":1}\n{"a":2}\n', b'{"a":"[\\n]"}\n')


def written(path, *blocks):
    sink = sink_of(path)(path)
    sizes = [sink.write(block) for block in blocks]
    sink.close()
    return sizes


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_blocks_stand_one_after_the_other(tmp_path, suffix):
    """The suffix selects the format, and each write returns its size."""
    path = tmp_path / f"t{suffix}"
    written(path, *BLOCKS)
    data = path.read_bytes()
    text = gzip.decompress(data) if suffix.endswith(".gz") else data
    events = json.loads(text) if ".json" in suffix else [json.loads(line) for line in text.splitlines()]

    assert [event["a"] for event in events] == [1, 2, "[\n]"]


def test_members_are_whole_by_themselves(tmp_path):
    """Each block is an independent gzip member, also without isal."""
    sizes = written(tmp_path / "t.pfw.gz", *BLOCKS)
    data = (tmp_path / "t.pfw.gz").read_bytes()

    assert sum(sizes) == len(data)
    assert zlib.decompress(data[sizes[0] :], 31) == BLOCKS[1]


def test_without_isal(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "isal", None)

    assert gzip.decompress(sinks.compressor()(b"x" * 100)) == b"x" * 100


def test_array_that_a_kill_left_open_is_gone_on_with(tmp_path):
    """An array without its closing bracket can be continued."""
    path = tmp_path / "t.json"
    written(path, BLOCKS[0])
    path.write_bytes(path.read_bytes().removesuffix(b"\n]\n"))
    written(path, BLOCKS[1])

    assert [event["a"] for event in json.loads(path.read_bytes())] == [1, 2, "[\n]"]


def test_paths_without_a_name_are_refused(tmp_path):
    with pytest.raises(UsageError, match="needs a file name"):
        expand_path("/")

    with pytest.raises(UsageError, match=r"ends in one of \.pfw, \.pfw\.gz"):
        sink_of(tmp_path / "trace")
