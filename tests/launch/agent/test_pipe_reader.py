"""The last lines of a worker, which its failure shows."""

from __future__ import annotations

import logging
import os

from traceml.launch.agent.pipe_reader import OutputTail
from traceml.launch.shared.log_records import RecordHandler


def test_the_last_lines_come_from_all_pipes(pipe: tuple[int, int]) -> None:
    """Output and records of `logging` are in the order of reading, however their bytes are cut."""
    tail = OutputTail()
    tail.add("out", b"first\nsec")
    RecordHandler(pipe[1]).handle(logging.LogRecord("data", logging.ERROR, "", 1, "disk is\n%s", ("full",), None))
    for byte in os.read(pipe[0], 1 << 16):
        tail.add("records", bytes([byte]))

    tail.add("out", b"ond\n")
    tail.add("err", b"no newline")

    assert tail.lines() == ["first", "ERROR:data:disk is", "full", "second", "no newline"]


def test_only_the_last_lines_are_kept(pipe: tuple[int, int]) -> None:
    """Of many records the newest stay; what is no record, or is longer than all that is kept, is left out."""
    tail, handler = OutputTail(), RecordHandler(pipe[1])
    for number in range(2000):
        handler.handle(logging.LogRecord("data", logging.INFO, "", 1, f"line {number}", None, None))
        tail.add("records", os.read(pipe[0], 1 << 16))

    assert tail.lines() == [f"INFO:data:line {number}" for number in range(1950, 2000)]

    tail.add("records", b"\x03\x00\x07\x00\x00\x00\x01abc")

    assert tail.lines()[-1] == "INFO:data:line 1999"
