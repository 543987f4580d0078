"""Output of workers reaches files, the screen and handlers: complete, by source, and without blocking others."""

from __future__ import annotations

import errno
import io
import logging
import logging.handlers
import os
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.eventually import eventually
from traceml.errors import SettingsError, UsageError
from traceml.launch.launcher.logs import log_handlers as handlers_module
from traceml.launch.launcher.logs.log_handlers import (
    add_filter_to_handler,
    file_handler,
    level_of,
    log_level,
    new_log_folder,
    stream_handler,
)
from traceml.launch.launcher.logs.log_router import LogRouter, check_handlers, make_handlers
from traceml.launch.shared.log_records import RecordDecoder, RecordHandler
from traceml.settings import level_number, load


class Keeping(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def routed(handlers: list[logging.Handler], *pieces: tuple[int | None, str, bytes]) -> None:
    """Feed pieces of (local rank, stream, bytes) of node1 and write all of it."""
    with closing(LogRouter(handlers)) as router:
        feeds = {}
        for local_rank, kind, data in pieces:
            key = (local_rank, kind)
            feeds[key] = feeds.get(key) or router.open("node1", local_rank, kind, rank=7)
            feeds[key].feed(data)

        for feed in feeds.values():
            feed.end()


def without_time(text: str) -> list[str]:
    return [line[20:] for line in text.splitlines()]


def test_everything_goes_to_a_file_per_worker_and_the_first_to_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By default: files of all, also of the silent, and the first agent and its first worker on stdout."""
    handlers = make_handlers(
        "auto", {"node1": 2, "node2": 1}, lambda: new_log_folder({"TRACEML_LOG_DIR": str(tmp_path)})
    )
    routed(handlers, (0, "out", b"a\nb\n"), (0, "err", b"bad\n"), (1, "out", b"unseen\n"), (None, "err", b"agent\n"))
    (folder,) = tmp_path.iterdir()
    files = {path.name: without_time(path.read_text()) for path in folder.iterdir()}

    assert files.keys() == {"node1[0].log", "node1[1].log", "node1.log", "node2[0].log", "node2.log"}
    assert files["node2[0].log"] == files["node2.log"] == []
    assert sorted(files["node1[0].log"]) == ["ERROR: bad", "INFO: a", "INFO: b"]
    assert files["node1[1].log"] == ["INFO: unseen"]
    assert sorted(without_time(capsys.readouterr().out)) == [
        "ERROR:node1: agent",
        "ERROR:node1[0]: bad",
        "INFO:node1[0]: a",
        "INFO:node1[0]: b",
    ]


def test_a_warning_of_torch_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Lines of its C++ libraries have the level that they name, between others, in whole and in pieces."""
    warning = b"[W1120 23:59:04.123 socket.cpp:207] [c10d] The hostname cannot be retrieved\n"
    pieces = [
        b"bad\n" + warning + b"worse\n[rank0]:" + warning[:9],
        warning[9:],
        b"[E1120 23:59:04.1 a.cpp:1] it fails",
    ]
    routed([stream_handler("node1", 0)], *((0, "err", piece) for piece in pieces))

    told = without_time(capsys.readouterr().out)
    assert [line.partition(":")[0] for line in told] == ["ERROR", "WARNING", "ERROR", "WARNING", "ERROR"]

    routed([stream_handler("node1")], (None, "err", b"srun: lacks support for cpu binding\nsrun: error: it fails\n"))
    told = without_time(capsys.readouterr().out)
    assert [line.partition(":")[0] for line in told] == ["WARNING", "ERROR"]

    routed(make_handlers("auto", {"node1": 1}, lambda: None, plain=True), (0, "err", warning))
    assert capsys.readouterr() == ("", warning.decode())


def test_a_progress_bar_stays_one_line_of_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Each update was a new line, and pushed everything else away."""
    routed(make_handlers("auto", {"node1": 1}, lambda: None, plain=True), (0, "err", b"\r 10%\r 20%\r100%\nend\n"))

    assert capsys.readouterr().err == "\r 10%\r 20%\r100%\nend\n"


def test_each_launch_has_a_folder_of_its_own(tmp_path: Path) -> None:
    """Two within one second do not share one; nothing is made before it begins."""
    environ = {"TORCHRUNX_LOG_DIR": str(tmp_path / "logs")}
    first, second = (make_handlers("auto", {"node1": 1}, lambda: new_log_folder(environ)) for _ in range(2))

    assert not (tmp_path / "logs").exists()
    routed(first, (0, "out", b"1"))
    routed(second, (0, "out", b"2"))
    assert sorted(without_time(path.read_text())[0] for path in (tmp_path / "logs").glob("*/*0].log")) == [
        "INFO: 1",
        "INFO: 2",
    ]


def test_files_can_be_turned_off_and_handlers_chosen() -> None:
    """An empty folder means none; handlers are taken as they are; anything else is refused."""
    keeping = Keeping()

    assert len(make_handlers("auto", {"node1": 3}, lambda: new_log_folder({"TRACEML_LOG_DIR": ""}))) == 2
    assert make_handlers(None, {"node1": 3}, Path) == []
    assert (
        make_handlers([keeping], {"node1": 3}, Path)
        == make_handlers(lambda: [keeping], {"node1": 3}, Path)
        == [keeping]
    )
    assert make_handlers(keeping, {"node1": 3}, Path) == [keeping]
    assert check_handlers(iter([keeping])) == [keeping]
    with pytest.raises(UsageError, match="'all'"):
        make_handlers("all", {"node1": 3}, Path)  # type: ignore[arg-type]


def test_handlers_of_the_users_get_records_that_say_where_they_come_from() -> None:
    """Level by stream, the logger's name, hostname, local rank and rank; filters and levels hold."""
    everything, agents, bad = Keeping(), Keeping(), Keeping()
    add_filter_to_handler(agents, "node1")
    add_filter_to_handler(bad, "node1", 0, log_level="ERROR")
    routed([everything, agents, bad], (0, "out", b"a\n"), (0, "err", b"b\n"), (None, "out", b"c\n"), (1, "err", b"d\n"))
    told: Any = sorted(
        (r.getMessage(), r.levelname, r.name, r.hostname, r.local_rank, r.rank) for r in everything.records
    )

    assert told[0] == ("a", "INFO", "traceml.launch.node1.0", "node1", 0, 7)
    assert told[2] == ("c", "INFO", "traceml.launch.node1", "node1", None, 7)
    assert [r.getMessage() for r in agents.records] == ["c"]
    assert [r.getMessage() for r in bad.records] == ["b"]


def test_a_filter_leaves_the_level_of_the_handler() -> None:
    handler = Keeping()
    handler.setLevel(logging.ERROR)
    add_filter_to_handler(handler, "node1", 0)
    assert handler.level == logging.ERROR


def test_a_handler_of_ours_obeys_a_format_and_a_level_of_the_users(tmp_path: Path) -> None:
    """Changes to a `file_handler` apply to lines too."""
    mine = file_handler("node1", 0, log_dir=tmp_path)
    mine.setFormatter(logging.Formatter("%(message)s!"))
    loud = stream_handler("node1", 0, io.StringIO())
    loud.setLevel("ERROR")
    routed([mine, loud], (0, "out", b"a\nb\n"))

    assert (tmp_path / "node1[0].log").read_text() == "a!\nb!\n"
    assert loud._stream.getvalue() == ""  # type: ignore[attr-defined]


PIECES = [
    ([b"a", b"b\nc", b"d"], ["ab", "cd"]),
    ([b"a\r\nb\r", b"\nc\r\n"], ["a", "b", "c"]),
    ([b"\r 10%", b"\r 20%", b"\r 30%", b"\r100%\n"], [" 10%", "100%"]),
    ([b" 10%\r", b" 20%\r", b" 30%\r"], [" 10%", " 30%"]),
    ([b"one\n\ntwo\n"], ["one", "", "two"]),
    (["ü".encode()[:1], "ü".encode()[1:], b"\xff\n"], ["ü�"]),
    ([b"", b"\n"], [""]),
]


@pytest.mark.parametrize(("pieces", "lines"), PIECES)
def test_lines_are_whole_however_they_come(pieces: list[bytes], lines: list[str]) -> None:
    """Cut anywhere, with any line end, with the bars of progress displays, with bytes that are no text."""
    keeping = Keeping()
    with closing(LogRouter([keeping])) as router:
        feed = router.open("node1", 0, "out")
        for piece in pieces:
            feed.feed(piece)
            eventually(router._queue.empty, "the piece to be taken")

        feed.end()

    assert [record.getMessage() for record in keeping.records] == lines


def test_a_line_without_an_end_is_passed_on_in_pieces() -> None:
    """A worker that writes megabytes without a newline fills no memory."""
    keeping = Keeping()
    with closing(LogRouter([keeping])) as router:
        feed = router.open("node1", 0, "out")
        for _ in range(10):
            feed.feed(b"x" * 250_000)
            eventually(router._queue.empty, "the piece to be taken")

        eventually(lambda: keeping.records, "a first piece of the line")
        feed.end()

    assert sum(len(record.getMessage()) for record in keeping.records) == 2_500_000


class Stopped(io.StringIO):
    """A terminal in which the user has pressed Ctrl-S."""

    def __init__(self) -> None:
        super().__init__()
        self.going = threading.Event()

    def write(self, text: str) -> int:
        assert self.going.wait(240)
        return super().write(text)


def test_a_stopped_terminal_holds_up_only_what_is_written_to_it() -> None:
    """BatchSource never waits; what is taken is granted once it has been written, to the last byte."""
    terminal, granted = Stopped(), []
    with closing(LogRouter([stream_handler("node1", 0, terminal)])) as router:
        feed = router.open("node1", 0, "out")
        feed.grant = granted.append
        for i in range(1000):
            feed.feed(b"%d\n" % i)

        router.grant_written()
        assert granted == []

        terminal.going.set()
        eventually(lambda: router.grant_written() or sum(granted) == 3890, "all bytes to be granted")  # type: ignore[func-returns-value]

    assert without_time(terminal.getvalue()) == [f"INFO:node1[0]: {i}" for i in range(1000)]


class Raising(logging.Handler):
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self._error = error

    def emit(self, record: logging.LogRecord) -> None:
        raise self._error("a mistake of the user's")


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit])
def test_a_handler_that_raises_is_reported_of_once_and_left_out(
    caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    """The others go on, also after a handler that ends its program at an error."""
    keeping = Keeping()
    routed([Raising(error), keeping], (0, "out", b"a\nb\n"), (0, "err", b"c\n"))

    assert len(keeping.records) == 3
    assert len([r for r in caplog.records if "receives no more" in r.getMessage()]) == 1


class OnFullDisk(Keeping):
    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "no space")


def test_a_handler_that_cannot_be_flushed_costs_no_result(caplog: pytest.LogCaptureFixture) -> None:
    """Its error is reported at the end of the launch, and the others are flushed."""
    shown = io.StringIO()
    buffering = logging.handlers.MemoryHandler(9, target=logging.StreamHandler(shown))
    routed([OnFullDisk(), buffering], (0, "out", b"a\n"))

    assert shown.getvalue() == "a\n"
    assert ["failed at the end of the launch" in record.getMessage() for record in caplog.records] == [True]


def test_a_folder_that_cannot_be_written_costs_the_files_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is said once which folder and why."""
    (tmp_path / "file").write_text("")
    shown = io.StringIO()
    logs: list[logging.Handler] = [file_handler("node1", i, log_dir=tmp_path / "file") for i in range(3)]
    logs.append(stream_handler("node1", 0, shown))
    routed(logs, *[(0, "out", b"a\n"), (0, "err", b"b\n")] * 3)

    assert len(shown.getvalue().splitlines()) == 6
    assert f"{tmp_path / 'file'}: logs cannot be written there: [Errno" in caplog.text
    assert len(caplog.records) == 1


def test_more_workers_than_files_that_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are closed and opened again; nothing is lost."""
    monkeypatch.setattr(handlers_module, "_MAX_OPEN_FILES", 3)
    logs: list[logging.Handler] = [file_handler("node1", i, log_dir=tmp_path) for i in range(10)]
    routed(logs, *[(i, "out", b"%d\n" % n) for n in range(3) for i in range(10)])

    assert [len((tmp_path / f"node1[{i}].log").read_text().splitlines()) for i in range(10)] == [3] * 10
    assert not handlers_module._open_files


def test_a_hundred_thousand_lines_of_two_workers_are_all_there(tmp_path: Path) -> None:
    """In order, in their files, through a console that takes one of them."""
    handlers = make_handlers("auto", {"node1": 2}, lambda: new_log_folder({"TRACEML_LOG_DIR": str(tmp_path)}))
    handlers[1] = stream_handler("node1", 0, shown := io.StringIO())
    lines = b"".join(b"line %d\n" % i for i in range(100_000))
    cuts = range(0, len(lines), 50_001)
    routed(handlers, *[(rank, "out", lines[start : start + 50_001]) for start in cuts for rank in (0, 1)])
    expected = [f"line {i}" for i in range(100_000)]

    for path in tmp_path.glob("*/*].log"):
        assert [line[26:] for line in path.read_text().splitlines()] == expected

    assert len(list(tmp_path.glob("*/*].log"))) == 2
    assert shown.getvalue().count("\n") == 100_000


def through(pipe: tuple[int, int], *records: logging.LogRecord) -> list[logging.LogRecord]:
    handler, decoder, found = RecordHandler(pipe[1]), RecordDecoder(), []
    for record in records:
        handler.handle(record)
        for byte in os.read(pipe[0], 1 << 20):
            found += decoder.feed(bytes([byte]))

    return found


def test_records_arrive_as_they_were(pipe: tuple[int, int]) -> None:
    """Name, level, time, place, the formatted message, the exception's text; whatever the message holds."""
    try:
        raise KeyError("gone")
    except KeyError:
        info = sys.exc_info()

    first = logging.LogRecord("my.module", 25, "/a/b.py", 12, "x = %s", ("\udc80é",), info, "func")
    long = logging.LogRecord("other", logging.INFO, "c.py", 1, "y" * 20_000, None, None)
    arrived, second = through(pipe, first, long)
    same = ("name", "levelno", "created", "pathname", "lineno", "funcName", "process", "threadName")

    assert [getattr(arrived, name) for name in same] == [getattr(first, name) for name in same]
    assert arrived.getMessage() == "x = \udc80é"
    assert "KeyError: 'gone'" in logging.Formatter().format(arrived)
    assert second.getMessage() == "y" * 20_000


class Unwritable(io.StringIO):
    def write(self, _text: str) -> int:
        raise RuntimeError("not from this thread")


@pytest.mark.parametrize("plain", [True, False])
def test_a_screen_that_raises_anything_costs_its_own_output(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, plain: bool
) -> None:
    """It is told once; other handlers get everything, and the thread that workers wait for goes on."""
    monkeypatch.setattr(sys, "stdout", Unwritable())
    keeping = Keeping()
    handlers = make_handlers("auto", {"node1": 1}, lambda: None, plain=plain)
    routed([*handlers, keeping], (0, "out", b"one\n"), (0, "out", b"two\n"))

    assert [record.getMessage() for record in keeping.records] == ["one", "two"]
    assert [("cannot write: not from this thread" in message) for message in caplog.messages] == [True]


def test_output_without_a_console_goes_to_the_other_handlers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Python has no sys.stdout where the descriptor was closed; errors still go to sys.stderr, if there is one."""
    err, keeping = io.StringIO(), Keeping()
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", err)
    handlers = make_handlers("auto", {"node1": 1}, lambda: None, plain=True)
    pieces = (0, "out", b"out\n"), (0, "err", b"err\n")
    routed([*handlers, stream_handler("node1", 0), keeping], *pieces)
    assert err.getvalue() == "err\n"

    monkeypatch.setattr(sys, "stdout", (out := io.StringIO()))
    monkeypatch.setattr(sys, "stderr", None)
    routed([*make_handlers("auto", {"node1": 1}, lambda: None, plain=True), keeping], *pieces)

    assert out.getvalue() == "out\n"
    assert [record.getMessage() for record in keeping.records] == ["out", "err"] * 2
    assert not caplog.messages


class Unformattable:
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(("text", "given"), [("%(loss)s", ({"los": 1},)), ("%s", (Unformattable(),))])
def test_a_record_that_cannot_be_formatted_is_reported_as_by_logging(
    pipe: tuple[int, int], capsys: pytest.CaptureFixture[str], text: str, given: tuple[object, ...]
) -> None:
    """The call that logs it goes on, and later records arrive."""
    handler = RecordHandler(pipe[1])
    handler.handle(logging.LogRecord("a", logging.INFO, "", 0, text, given, None))
    handler.handle(logging.LogRecord("a", logging.INFO, "", 0, "good", None, None))
    arrived = RecordDecoder().feed(os.read(pipe[0], 65536))

    assert [record.getMessage() for record in arrived] == ["good"]
    assert "--- Logging error ---" in capsys.readouterr().err


CHILD = """
import logging, os, sys
from traceml.launch.shared.log_records import install
install(int(sys.argv[1]))
children = []
for number in range(4):
    child = os.fork()
    if child == 0:
        for i in range(200):
            logging.getLogger(f"of.{number}").info("%d %s", i, "z" * 9000)
        os._exit(0)
    children.append(child)
for child in children:
    os.waitpid(child, 0)
logging.debug("too low")
logging.warning("the last words")
os.abort()
"""


def test_forked_children_share_a_pipe_and_last_words_arrive(pipe: tuple[int, int]) -> None:
    """Long records of several processes do not mix, and what was logged before a crash is there."""
    with subprocess.Popen([sys.executable, "-c", CHILD, str(pipe[1])], pass_fds=(pipe[1],)) as process:
        decoder, found = RecordDecoder(), []
        while not found or found[-1].getMessage() != "the last words":
            found += decoder.feed(os.read(pipe[0], 65536))

    assert process.returncode == -6
    for number in range(4):
        numbers = [int(r.getMessage().split()[0]) for r in found if r.name == f"of.{number}"]
        assert numbers == list(range(200))

    assert len(found) == 801


def test_a_pipe_with_other_bytes_is_reported_of_once(pipe: tuple[int, int]) -> None:
    """Records before them arrive."""
    decoder = RecordDecoder()
    handler = RecordHandler(pipe[1])
    handler.handle(logging.LogRecord("a", logging.INFO, "", 0, "good", None, None))
    good = os.read(pipe[0], 65536)
    found = decoder.feed(good + b"\x03\x00\x01\x00\x00\x00\x01abc" + good) + decoder.feed(good)

    assert [record.getMessage()[:25] for record in found] == ["good", "the worker's logging reco"]


def test_records_go_to_files_with_their_own_level(tmp_path: Path, pipe: tuple[int, int]) -> None:
    """A file has them as lines, by the plain handlers' format."""
    RecordHandler(pipe[1]).handle(logging.LogRecord("my.module", logging.WARNING, "", 0, "look", None, None))
    routed([file_handler("node1", 0, log_dir=tmp_path)], (0, "records", os.read(pipe[0], 65536)), (0, "out", b"out\n"))

    assert without_time((tmp_path / "node1[0].log").read_text()) == ["WARNING: look", "INFO: out"]


def test_the_level_of_workers_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours before torchrunx's; INFO otherwise, unless this process wants more."""
    assert log_level({}) == logging.INFO
    assert log_level({"TORCHRUNX_LOG_LEVEL": "debug"}) == logging.DEBUG
    assert log_level({"TRACEML_LOG_LEVEL": "warning", "TORCHRUNX_LOG_LEVEL": "15"}) == logging.WARNING
    monkeypatch.setattr(logging.getLogger(), "level", 5)
    assert log_level({}) == 5
    with pytest.raises(SettingsError, match="'loud' is not a level"):
        log_level({"TRACEML_LOG_LEVEL": "loud"})


def test_a_level_is_no_stream() -> None:
    """It is the third argument of torchrunx's handler; the output was lost, with a warning at the first line."""
    with pytest.raises(UsageError, match=r"stream=20 is no stream: .* setLevel"):
        stream_handler("node1", 0, logging.INFO)  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "number"), [("WARN", 30), ("fatal", 50), ("NOTSET", 0)])
def test_a_launch_takes_every_word_of_logging(text: str, number: int) -> None:
    """As torchrunx did, whose variable it is."""
    assert level_of({"TORCHRUNX_LOG_LEVEL": text}) == number


@pytest.mark.parametrize(("text", "number"), [("CRITICAL", 50), ("15", 15)])
def test_the_setting_takes_the_same_levels(text: str, number: int) -> None:
    environ = {"TRACEML_LOG_LEVEL": text}
    assert level_of(environ) == level_number(load(environ).log_level) == number
