"""Words for the end of a process."""

from __future__ import annotations

import pytest

from traceml.process_ends import end_of_status, exit_text, signal_name, signal_text


def test_a_signal_has_its_name() -> None:
    """A number without a name stays a number."""
    assert (signal_name(9), signal_name(250)) == ("SIGKILL", "signal 250")
    assert (signal_text(9), signal_text(250)) == ("signal 9 (SIGKILL)", "signal 250")


@pytest.mark.parametrize(
    ("code", "ended_by", "text"),
    [
        (3, None, "ended with exit code 3"),
        (None, 11, "was killed by signal 11 (SIGSEGV)"),
        (0, 9, "was killed by signal 9 (SIGKILL)"),
        (None, None, "ended"),
    ],
)
def test_an_end_has_a_signal_or_a_code(code, ended_by, text) -> None:
    """The signal counts where there is one: the code was told before it."""
    assert exit_text(code, ended_by) == text


def test_a_status_of_subprocess_is_either() -> None:
    """Signals are negative there."""
    assert (end_of_status(-15), end_of_status(2)) == ("was killed by signal 15 (SIGTERM)", "ended with exit code 2")
