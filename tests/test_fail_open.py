"""Errors that are logged, counted and passed over."""

from __future__ import annotations

import errno
import logging

import pytest

from traceml.errors import SettingsError, StoreError, TraceMLError
from traceml.fail_open import fail_open, failures, writing

_log = logging.getLogger("traceml.test")


def test_an_error_is_logged_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    """The warning names what failed and why, and the package's count goes up."""
    before = failures().get("attic", 0)

    with fail_open(_log, "attic", "the roof could not be mended"):
        raise ZeroDivisionError("rain")

    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == "the roof could not be mended: ZeroDivisionError('rain')"
    assert record.exc_info is not None
    assert failures()["attic"] == before + 1


def test_a_handler_that_raises_ends_no_call_of_ours() -> None:
    """The first logged value ended the script of a user whose handler raised, where its level let our message pass."""

    class Raising(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            raise ValueError(record)

    handler, log = Raising(), logging.getLogger("traceml")
    log.addHandler(handler)
    try:
        log.warning("a message")
    finally:
        log.removeHandler(handler)


def test_the_handled_error_is_at_hand() -> None:
    """What follows the block can report it."""
    with fail_open(_log, "attic", "the roof could not be mended") as guarded:
        pass

    assert guarded.error is None
    with fail_open(_log, "attic", "the roof could not be mended") as guarded:
        raise ValueError("rain")

    assert str(guarded.error) == "rain"


def test_no_traceback_for_errors_of_the_system(caplog: pytest.LogCaptureFixture) -> None:
    """An OSError is logged by its text."""
    with fail_open(_log, "attic", "the file could not be read"):
        raise FileNotFoundError("gone")

    (record,) = caplog.records
    assert (record.getMessage(), record.exc_info) == ("the file could not be read: gone", None)


def test_an_error_without_a_text_is_logged_too(caplog: pytest.LogCaptureFixture) -> None:
    """A third party's error whose text raises does not come out."""

    class Broken(OSError):
        def __str__(self) -> str:
            raise KeyError("no text")

    with fail_open(_log, "attic", "the roof could not be mended"):
        raise Broken

    assert "Broken, whose text failed with KeyError" in caplog.text


def test_repeats_are_quiet(caplog: pytest.LogCaptureFixture) -> None:
    """With `once` a text is a warning the first time only, and every failure counts."""
    caplog.set_level(logging.DEBUG, logger="traceml.test")
    before = failures().get("attic", 0)
    for _ in range(3):
        with fail_open(_log, "attic", "the window is stuck", once=True):
            raise ValueError

    assert [record.levelname for record in caplog.records] == ["WARNING", "DEBUG", "DEBUG"]
    assert failures()["attic"] == before + 3


def test_named_exceptions_pass() -> None:
    """`reraise`, and everything that is no `Exception`, reaches the caller uncounted."""
    before = failures().get("attic", 0)

    with pytest.raises(SettingsError), fail_open(_log, "attic", "a thing failed", reraise=SettingsError):
        raise SettingsError("port", "is no number", source="argument", allowed="1..65535")
    with pytest.raises(KeyboardInterrupt), fail_open(_log, "attic", "a thing failed"):
        raise KeyboardInterrupt

    assert failures().get("attic", 0) == before


def test_what_cannot_be_written_is_explained() -> None:
    """The text names the file, the cause and a remedy."""
    words = r"^cannot write out\.json: No space left on device. Name another file$"
    with pytest.raises(StoreError, match=words), writing("out.json", "Name another file", kind=StoreError):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_an_error_of_what_is_read_for_a_file_is_not_of_the_file() -> None:
    """A damaged store, whose error is an OSError, made a profile seem to be unwritable."""
    with pytest.raises(TraceMLError, match=r"^the store is damaged$"), writing("out.json"):
        raise StoreError("the store is damaged")
