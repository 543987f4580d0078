"""Numbers as people read them."""

from __future__ import annotations

import os

import pytest

from traceml.formatting import (
    ESCAPED,
    bytes_text,
    capitalized,
    cores_text,
    count_text,
    cut_text,
    duration_text,
    exception_line,
    factor_text,
    gain_text,
    left_text,
    line_text,
    ms_text,
    name_at_rank,
    name_order,
    name_without_rank,
    names_text,
    ns_text,
    ordinal_text,
    overhead_text,
    percent_text,
    phase_label,
    phase_words,
    place_text,
    plural,
    printable,
    ranks_text,
    rate_text,
    shell_joined,
    short_label,
    value_text,
)
from traceml.run_folder import report_command


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
        (999_999_999.0, "1000000 s"),
        (1e9, "1e+06 s"),
        (1.8446744e16, "1.84e+13 s"),
        (1e297, "1e+294 s"),
        (-0.001, "-1 us"),
        (-27.34, "-27.3 ms"),
        (-1e297, "-1e+294 s"),
        (None, "-"),
    ],
)
def test_ms_text(ms, text):
    """Milliseconds have three digits and the unit that fits."""
    assert ms_text(ms) == text


@pytest.mark.parametrize(
    ("cores", "text"),
    [(0.0, "0 cores"), (0.03, "less than 0.1 cores"), (0.44, "0.4 cores"), (0.98, "1 core"), (15.7, "16 cores")],
)
def test_cores_text(cores, text):
    """A program that computes little does not use nothing."""
    assert cores_text(cores) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1 KiB"), (412 << 20, "412 MiB"), (1_288_490_188, "1.20 GiB"), (3 << 50, "3072 TiB")],
)
def test_bytes_text(size, text):
    """Sizes have three digits and a binary unit."""
    assert bytes_text(size) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0 %"),
        (0.0004, "<0.1 %"),
        (0.004, "0.4 %"),
        (0.996, "99.6 %"),
        (0.9903, "99 %"),
        (0.9998, "100 %"),
        (0.787, "79 %"),
        (1.0, "100 %"),
        (None, "-"),
    ],
)
def test_percent_text(share, text):
    """Shares are whole percents, with one digit below one."""
    assert percent_text(share) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.026, "26.0 ms"),
        (0.0715, "71.5 ms"),  # as 0.1 s, 150 times it would be half as much again
        (0.84, "0.8 s"),
        (42.4, "42 s"),
        (727, "12:07"),
        (11045, "3:04:05"),
        (None, "-"),
    ],
)
def test_duration_text(seconds, text):
    """Durations are seconds, then minutes, then hours; milliseconds where one digit of a second says too little."""
    assert duration_text(seconds) == text


def test_other_texts():
    """Counts have separators, rates three digits, overheads both figures."""
    assert (count_text(1204), count_text(None)) == ("1,204", "-")
    assert [ordinal_text(number) for number in (2, 3, 11, 21, 1000)] == ["2nd", "3rd", "11th", "21st", "1,000th"]
    assert (rate_text(0.213), rate_text(36.61), rate_text(15200.0)) == ("0.21", "36.6", "15,200")
    assert overhead_text(5.13, 0.0002) == "5.1 us per step (0.02 %)"
    assert overhead_text(None, None) == "not measured"


def test_ns_and_factor_text():
    """A duration in nanoseconds reads as one in milliseconds; a factor has two or three digits."""
    assert (ns_text(20_400_000), ns_text(850_000)) == ("20.4 ms", "850 us")
    assert (factor_text(4.69), factor_text(1.126)) == ("4.7x", "1.13x")
    assert (factor_text(1331.9), factor_text(99.9)) == ("1,332x", "99.9x")


def test_a_gain_is_no_promise_beyond_ten():
    """Where a step is nearly all cost, the quotient is not what anybody reaches."""
    assert (gain_text(1.126), gain_text(10.0)) == ("1.13x faster", "10.0x faster")
    assert (gain_text(12.6), gain_text(float("inf"))) == ("more than 10x faster",) * 2
    assert (gain_text(1.5, "about"), gain_text(12.6, "about")) == ("about 1.50x faster", "more than 10x faster")
    assert (gain_text(1.5, "at most"), gain_text(12.6, "at most")) == (
        "at most 1.50x faster",
        "perhaps more than 10x faster",
    )


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([], "all ranks"),
        ([3], "rank 3"),
        ([1, 3], "ranks 1, 3"),
        ([1, 0], "ranks 0, 1"),
        ([0, 1, 2, 3, 7], "ranks 0-3, 7"),
        (range(16), "ranks 0-15"),
        (range(1, 24, 2), "ranks 1, 3, 5, 7 and 8 more"),
        ([1, 3, 5, 7, *range(10, 3000)], "ranks 1, 3, 5, 7 and 2,990 more"),
    ],
)
def test_ranks_text(ranks, text):
    """Ranks are listed as ranges, at most four of them."""
    assert ranks_text(ranks) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, ""), (1, "gpu0"), (4, "gpu0, gpu1, gpu2, gpu3"), (1250, "gpu0, gpu1, gpu2, gpu3 and 1,246 more")],
)
def test_names_text(count: int, text: str) -> None:
    """A job has up to thousands of hosts: the first are listed, the others counted."""
    assert names_text([f"gpu{number}" for number in range(count)]) == text


def test_phases():
    """A phase has a label, a short label and words for a sentence; the user's own are named."""
    assert [phase_label("input_wait"), short_label("optimizer"), phase_words("h2d")] == [
        "input", "optim", "host-to-device copying",
    ]  # fmt: skip
    assert [phase_label("augment"), phase_words("augment")] == ["augment", "phase 'augment'"]
    assert [phase_words(name) for name in ("phase forward", "phase 2", "")] == [
        "phase 'forward'", "phase 'phase 2'", "phase ''",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("loss/train é 漢字 👩‍💻", "loss/train é 漢字 👩‍💻"),
        ("\x1b[2J\x9b31m\x00\x7f", r"\x1b[2J\x9b31m\x00\x7f"),
        ("\u202egnp.exe\u2066\u200b\u2028\ufeff", r"\u202egnp.exe\u2066\u200b\u2028\ufeff"),
        ("\udce9\U000e0041", r"\xe9\U000e0041"),
        ("a\tb\nc\r\n", r"a    b\nc\r\n"),
    ],
)
def test_printable(text, shown):
    """Nothing that a terminal obeys or that reorders text stays; scripts, accents and emoji do."""
    assert printable(text) == shown


def test_bytes_of_names_that_are_not_utf8_are_shown() -> None:
    """Also in a command, which bash understands, and where text is encoded."""
    name = os.fsdecode(b"tr\xff it's.py")

    assert printable(name) == r"tr\xff it's.py"
    assert name.encode(errors=ESCAPED) == rb"tr\xff it's.py"
    assert "\ud800".encode(errors=ESCAPED) == rb"\ud800"
    command = shell_joined(["printf", "%s", name, "plain it's"])
    assert command == r"""printf %s $'tr\xff it\'s.py' 'plain it'"'"'s'"""
    assert report_command(name) == r"traceml report $'tr\xff it\'s.py'"


def test_printable_keeps_lines_where_they_are_meant():
    """Ends of lines stay, a line that rewrites itself does not."""
    assert printable("a\r\n\tb\rc\n", lines=True) == "a\n    b\\rc\n"


def test_capitalized():
    """Only the first letter changes."""
    assert capitalized("rank 1 of H200") == "Rank 1 of H200"


@pytest.mark.parametrize(
    ("place", "room", "shown"),
    [
        ("/home/me/train.py:7 main", 40, "/home/me/train.py:7 main"),
        ("/home/me/projects/a/very/deep/folder/train.py:7 main", 40, "/home/.../deep/folder/train.py:7 main"),
        ("/home/me/projects/train.py:7 main", 10, ".../train.py:7 main"),
        ("train.py:7 a_function_with_a_long_name", 10, "train.py:7 a_function_with_a_long_name"),
    ],
)
def test_the_middle_of_a_path_is_left_out(place, room, shown):
    """File, line and function always stay."""
    assert place_text(place, room) == shown


def test_a_function_inside_another_is_named_with_it():
    """Python's `<locals>` says nothing to a reader."""
    assert line_text("/x/train.py", 9, "main.<locals>.delay") == "train.py:9 main.delay"
    assert line_text("/x/train.py", 9, "main", [7, 12]) == "train.py:9 main (lines 7-12)"
    assert line_text("/x/train.py", 9, "<module>") == "train.py:9"


def test_one_thing_is_no_plural():
    """`1 step`, and thousands are grouped."""
    assert [plural(count, "step") for count in (0, 1, 1204)] == ["0 steps", "1 step", "1,204 steps"]
    assert [plural(count, "batch") for count in (1, 2)] == ["1 batch", "2 batches"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.3, "0.3 s"), (5.0, "5 s"), (6.4, "6.4 s"), (60.0, "60 s"), (600.0, "10 min")]
)
def test_left_text(seconds, text):
    """A limit of a fraction of a second is not 0 s."""
    assert left_text(seconds) == text


@pytest.mark.parametrize(("name", "rank", "at_rank"), [("loss", 0, "loss"), ("loss", 12, "loss/rank_12")])
def test_a_name_with_its_rank_is_read_back(name: str, rank: int, at_rank: str) -> None:
    assert name_at_rank(name, rank) == at_rank
    assert name_without_rank(at_rank) == name


def test_a_name_that_only_resembles_one_with_a_rank_stays() -> None:
    assert name_without_rank("norm/rank_loss") == "norm/rank_loss"


def test_names_are_sorted_by_their_numbers():
    """As people count, also with leading zeros and other signs, and the same each time."""
    names = ["layer10.w", "layer2.w", "loss", "layer02.w", "layer2", "a/1", "1", "", "9" * 5000, "acc"]

    assert sorted(names, key=name_order) == [
        "", "1", "9" * 5000, "a/1", "acc", "layer2", "layer02.w", "layer2.w", "layer10.w", "loss",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("exception", "line"),
    [
        ("ValueError: bad batch\nmore", "ValueError: bad batch"),
        ("RuntimeError: Failed:\n  the loss is nan\nmore", "RuntimeError: Failed: the loss is nan"),
        ("UnpicklingError: Weights only \x1b[1mload\x1b[0m failed", "UnpicklingError: Weights only load failed"),
        ("", ""),
    ],
)
def test_the_line_of_an_exception(exception, line):
    """It says what happened in one line, without the colors that torch gives some of its texts."""
    assert exception_line(exception) == line


@pytest.mark.parametrize(("most", "text"), [(7, "loss is"), (6, "los..."), (3, "...")])
def test_a_text_that_is_cut(most, text):
    """It has at most that many characters, and three dots say that there were more."""
    assert cut_text("loss is", most) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123456, "0.12346"), (12345.0, "12345"), (-1.23456e-5, "-1.2346e-05"), (3, "3"), ("adam", "adam"), (None, "-")],
)
def test_logged_values_have_five_digits(value: float | str | None, text: str) -> None:
    assert value_text(value) == text
