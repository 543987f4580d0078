"""Numbers as people read them."""

from __future__ import annotations

import pytest

from traceml.formatting import (
    bytes_text,
    count_text,
    duration_text,
    ms_text,
    overhead_text,
    percent_text,
    rate_text,
)


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0.0, "0 us"),
        (0.00512, "5.12 us"),
        (0.0515, "51.5 us"),
        (0.9, "900 us"),
        (0.9996, "1.00 ms"),
        (27.34, "27.3 ms"),
        (273.4, "273 ms"),
        (999.6, "1.00 s"),
        (123_456.0, "123 s"),
        (None, "-"),
    ],
)
def test_ms_text(ms, text):
    """Milliseconds have three digits and the unit that fits."""
    assert ms_text(ms) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1 KiB"), (412 << 20, "412 MiB"), (1_288_490_188, "1.20 GiB"), (3 << 50, "3072 TiB")],
)
def test_bytes_text(size, text):
    """Sizes have three digits and a binary unit."""
    assert bytes_text(size) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0 %"), (0.0004, "<0.1 %"), (0.004, "0.4 %"), (0.787, "79 %"), (1.0, "100 %"), (None, "-")],
)
def test_percent_text(share, text):
    """Shares are whole percents, with one digit below one."""
    assert percent_text(share) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.84, "0.8 s"), (42.4, "42 s"), (727, "12:07"), (11045, "3:04:05"), (None, "-")]
)
def test_duration_text(seconds, text):
    """Durations are seconds, then minutes, then hours."""
    assert duration_text(seconds) == text


def test_other_texts():
    """Counts have separators, rates three digits, overheads both figures."""
    assert (count_text(1204), count_text(None)) == ("1,204", "-")
    assert (rate_text(0.213), rate_text(36.61), rate_text(15200.0)) == ("0.21", "36.6", "15,200")
    assert overhead_text(5.13, 0.0002) == "5.1 us per step (0.02 %)"
    assert overhead_text(None, None) == "not measured"
