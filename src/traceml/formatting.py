"""Text for numbers, ranks and phases; texts of numbers have a bounded width."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = [
    "ESCAPED",
    "bytes_text",
    "capitalized",
    "code_parts",
    "cores_text",
    "count_text",
    "cut_text",
    "duration_text",
    "error_text",
    "exception_line",
    "factor_text",
    "gain_text",
    "has_gain",
    "json_text",
    "largest_text",
    "left_text",
    "library_text",
    "line_text",
    "ms_text",
    "name_at_rank",
    "name_order",
    "name_without_rank",
    "names_text",
    "ns_text",
    "ordinal_text",
    "overhead_text",
    "parsed_place",
    "part_words",
    "percent_text",
    "phase_label",
    "phase_words",
    "phases_text",
    "place_text",
    "place_words",
    "plural",
    "printable",
    "ranks_text",
    "rate_text",
    "sample_text",
    "shell_joined",
    "shell_quoted",
    "short_exception",
    "short_label",
    "summed_text",
    "value_text",
]

MISSING = "-"
_RANK_MARK = "/rank_"
# A step can lose nearly all of its time in the sum, but no run is made that much faster.
_MAX_GAIN = 10

# Characters that a terminal obeys, or that reorder or hide the text around them: C0 and C1 controls, marks and
# overrides of direction, zero-width spaces, separators of lines, tags, halves of surrogate pairs. The joiners of
# scripts and emoji (U+200C, U+200D) stay.
_UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\ud800-\udfff\U000e0000-\U000e007f]"
)
_UNPRINTABLE_BUT_NEWLINE = re.compile(_UNPRINTABLE.pattern.replace(r"\x00-\x1f", r"\x00-\x09\x0b-\x1f"))

ESCAPED = "traceml.escaped"
"""Name of the handler of errors that shows what cannot be encoded as `printable` does."""
_BYTES = range(0xDC80, 0xDD00)

_PARTS = {
    "startup": "start-up",
    "checkpoint": "saving",
    "between_epochs": "between epochs",
    "hang": "without progress",
    "idle": "after the last step",
    "restart": "restarts",
}
# Phase -> (label in a table, words in a sentence). Other names are the user's own phases.
_PHASES = {
    "input_wait": ("input", "data loading"),
    "h2d": ("h2d", "host-to-device copying"),
    "forward": ("forward", "forward"),
    "backward": ("backward", "backward"),
    "optimizer": ("optimizer", "optimizer"),
    "comm": ("comm", "communication"),
    "checkpoint": ("checkpoint", "checkpoint saving"),
    "user": ("user", "user phases"),
    "other": ("other", "code outside the known phases"),
    "startup": ("start-up", "start-up"),
    "outside": ("outside steps", "code outside steps"),
    "after": ("after the last step", "code after the last step"),
    "workers": ("loader workers, while they make batches", "loader workers"),
    "evaluation": ("evaluation", "evaluation"),
    "exit": ("exit", "the end of the process"),
}
_SHORT_LABELS = {"optimizer": "optim", "checkpoint": "ckpt"}
_PACKAGES_FOLDER = re.compile(r"^.*/(site-packages|dist-packages|python3\.\d+)/")
_ELIDED = ".../"  # for folders of a path
_COLORS = re.compile(r"\x1b\[[\d;]*m")
_CODE = re.compile("`([^`\n]+)`")
_NUMBERS = re.compile("([0-9]+)")
_EXCEPTION_CHARS = 160
_MAX_MS = 1e9  # of a duration that is written in full
_LISTED_RANKS = 4  # ranks, or ranges of ranks, that are listed


def count_text(count: int | None) -> str:
    """Return `1,204`."""
    return MISSING if count is None else f"{count:,}"


def value_text(value: float | str | None) -> str:
    """Return a logged value or a parameter in few characters; a dash for one that is not known or not finite."""
    if isinstance(value, float):
        return f"{value:.5g}"

    return MISSING if value is None else str(value)


def json_text(value: Any) -> str:
    """Return a text as it is, and any other value as JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def name_order(name: str) -> tuple[tuple[int, str], ...]:
    """Return the key by which names are sorted for people: `layer2` comes before `layer10`."""
    parts = _NUMBERS.split(name)  # texts and numbers by turns
    numbers = [part.lstrip("0") if index % 2 else "" for index, part in enumerate(parts)]
    ordered = ((len(number), number or part) for part, number in zip(parts, numbers, strict=True))
    return (*ordered, (0, name))


def name_at_rank(name: str, rank: int) -> str:
    """Return the name of a rank's value where one run holds those of all ranks: `loss`, and `loss/rank_3` of rank 3."""
    return f"{name}{_RANK_MARK}{rank}" if rank else name


def name_without_rank(name: str) -> str:
    """Return the name under which rank 0 logs the same value."""
    head, mark, rank = name.rpartition(_RANK_MARK)
    return head if mark and rank.isdigit() else name


def cores_text(cores: float) -> str:
    """Return `1 core`, `0.4 cores`, `16 cores`, `less than 0.1 cores`."""
    if 0 < cores < 0.05:
        return "less than 0.1 cores"

    number = f"{cores:.1f}" if cores < 9.95 else f"{cores:.0f}"
    return f"{number.removesuffix('.0')} core{'' if number.removesuffix('.0') == '1' else 's'}"


def ordinal_text(number: int) -> str:
    """Return `2nd`, `11th`, `1,000th`."""
    suffix = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number:,}{suffix}"


def plural(count: int | None, word: str) -> str:
    """Return `1 step`, `1,204 steps`, `3 batches`."""
    ending = "" if count == 1 else "es" if word.endswith("tch") else "s"
    return f"{count_text(count)} {word}{ending}"


def ms_text(ms: float | None) -> str:
    """Return three digits and a unit: `812 us`, `2.73 ms`, `27.3 ms`, `1.20 s`, `1.84e+13 s`."""
    if ms is None:
        return MISSING

    if ms <= -0.9995:  # traces of others may have any number
        return f"-{ms_text(-ms)}"

    if ms < 0.9995:
        return f"{ms * 1e3:.3g} us" if ms * 1e3 < 99.95 else f"{ms * 1e3:.0f} us"

    if ms < 999.5:
        return f"{_three_digits(ms)} ms"

    if ms >= _MAX_MS:
        return f"{ms / 1e3:.3g} s"

    return f"{_three_digits(ms / 1e3)} s"


def ns_text(nanoseconds: float) -> str:
    """Return a duration as `ms_text` does."""
    return ms_text(nanoseconds / 1e6)


def factor_text(value: float) -> str:
    """Return a ratio: `628x`, `4.7x`, `1.13x`."""
    if value >= 99.95:
        return f"{value:,.0f}x"

    return f"{value:.1f}x" if value >= 1.995 else f"{value:.2f}x"


def gain_text(speedup: float, qualifier: str = "") -> str:
    """Return how much faster a run would be: `1.13x faster`; no promise beyond `more than 10x faster`.

    Args:
        qualifier: `about`, `at least` or `at most`, written before a factor up to 10.
    """
    if speedup > _MAX_GAIN:
        return f"{'perhaps ' if qualifier == 'at most' else ''}more than {_MAX_GAIN}x faster"

    return f"{qualifier} {factor_text(speedup)} faster".lstrip()


def has_gain(text: str) -> bool:
    """Return whether a sentence says how much faster a run would be, in the words of `gain_text`."""
    return "x faster" in text


def rate_text(per_second: float | None) -> str:
    """Return steps per second: `0.21`, `36.6`, `1,204`."""
    if per_second is None:
        return MISSING

    return f"{per_second:,.0f}" if per_second >= 999.5 else _three_digits(per_second)


def bytes_text(size: int | None) -> str:
    """Return `412 MiB`, `1.20 GiB`."""
    if size is None:
        return MISSING

    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 999.5 or unit == "TiB":
            break
        value /= 1024

    return f"{value:.0f} {unit}" if unit in ("B", "KiB") else f"{_three_digits(value)} {unit}"


def percent_text(share: float | None) -> str:
    """Return a share 0..1 as `62 %`; near the ends as `0.4 %`, `99.6 %`.

    A small remainder is not rounded to 0 % or 100 %.
    """
    if share is None:
        return MISSING

    percent = 100 * share
    if 0 < percent < 0.1:
        return "<0.1 %"

    return f"{percent:.1f} %" if 0 < percent < 0.95 or 99.05 <= percent < 99.95 else f"{percent:.0f} %"


def duration_text(seconds: float | None) -> str:
    """Return `26 ms`, `0.8 s`, `42 s`, `12:07`, `3:04:05`."""
    if seconds is None:
        return MISSING

    if 0 < seconds < 0.25:
        return ms_text(1e3 * seconds)

    if seconds < 9.95:
        return f"{seconds:.1f} s"

    if seconds < 99.5:
        return f"{seconds:.0f} s"

    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def left_text(seconds: float) -> str:
    """Return a limit or a time left, in a sentence: `0.5 s`, `5 s`, `42 s`, `12 min`, `3 h 4 min`."""
    if seconds < 99.5:
        return duration_text(seconds).replace(".0 ", " ")

    hours, minutes = divmod(round(seconds / 60), 60)
    return " ".join(part for part in (f"{hours} h" if hours else "", f"{minutes} min" if minutes else "") if part)


def overhead_text(us_per_step: float | None, share: float | None) -> str:
    """Return what tracing costs: `5.1 us per step (0.02 %)`."""
    if us_per_step is None:
        return "not measured"

    return f"{us_per_step:.1f} us per step" + (f" ({_fine_percent(share)})" if share is not None else "")


def _fine_percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 9.95 else f"{percent:.1f} %" if percent >= 0.95 else f"{percent:.2g} %"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def ranks_text(ranks: Iterable[int]) -> str:
    """Return `rank 3`, `ranks 0-3, 7`, `ranks 1, 3, 5, 7 and 12 more`; `all ranks` for none."""
    numbers = sorted(ranks)
    if not numbers:
        return "all ranks"

    if len(numbers) == 1:
        return f"rank {numbers[0]}"

    ranges = _ranges(numbers)
    listed, rest = ranges[:_LISTED_RANKS], ranges[_LISTED_RANKS:]
    text = ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in listed)
    more = sum(last - first + 1 for first, last in rest)
    return f"ranks {text}" + (f" and {count_text(more)} more" if more else "")


def names_text(names: Sequence[str], most: int = 4) -> str:
    """Return `gpu1, gpu2`, of many names the first `most`: `gpu1, gpu2 and 6 more`."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {count_text(more)} more" if more > 0 else "")


def _ranges(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Return runs of three or more consecutive numbers as (first, last), others alone."""
    ranges: list[tuple[int, int]] = []
    start = 0
    for end in range(1, len(numbers) + 1):
        if end < len(numbers) and numbers[end] == numbers[end - 1] + 1:
            continue

        run = numbers[start:end]
        ranges += [(run[0], run[-1])] if len(run) > 2 else [(number, number) for number in run]
        start = end

    return ranges


def printable(text: str, *, lines: bool = False) -> str:
    r"""Return a text that can be shown anywhere: what a terminal would obey is shown as its escape, `\x1b`.

    Names, exceptions and log texts are the script's. Whoever looks at a run must not have to trust it.

    Args:
        lines: whether the text may have several lines.
    """
    if text.isprintable():
        return text

    unprintable = _UNPRINTABLE_BUT_NEWLINE if lines else _UNPRINTABLE
    text = text.replace("\r\n", "\n") if lines else text
    return unprintable.sub(_escape, text.replace("\t", "    "))


def _escape(found: re.Match[str]) -> str:
    character = ord(found.group())
    if character in _BYTES:  # of a name that is not UTF-8, as `os.fsdecode` returns it
        return f"\\x{character - _BYTES.start + 0x80:02x}"

    return found.group().encode("unicode_escape").decode()


def _escaped_bytes(error: UnicodeError) -> tuple[str, int]:
    """Return the escapes of what cannot be encoded, and where the encoder continues."""
    assert isinstance(error, UnicodeEncodeError)
    return _UNPRINTABLE.sub(_escape, error.object[error.start : error.end]), error.end


codecs.register_error(ESCAPED, _escaped_bytes)


def shell_quoted(text: str) -> str:
    """Return a text as a word of bash and zsh; bytes that are not UTF-8 are escaped, so that it can be printed."""
    import shlex  # a rank rarely needs it

    if not any(ord(character) in _BYTES for character in text):
        return shlex.quote(text)

    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{_UNPRINTABLE.sub(_escape, escaped)}'"


def shell_joined(words: Iterable[str]) -> str:
    """Return the words of a command as one line."""
    return " ".join(map(shell_quoted, words))


def capitalized(text: str) -> str:
    """Return the text with a capital first letter, the rest unchanged."""
    return text[:1].upper() + text[1:]


def cut_text(text: str, most: int) -> str:
    """Return the text in at most `most` characters; a longer one ends in three dots."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def code_parts(text: str) -> list[tuple[str, bool]]:
    """Return the parts of a text, and whether each is code, which is between backticks on a terminal."""
    return [(part, index % 2 == 1) for index, part in enumerate(_CODE.split(text)) if part]


def phase_label(phase: str) -> str:
    """Return a phase's name for a column or a bar."""
    return _PHASES[phase][0] if phase in _PHASES else phase


def largest_text(largest: float | None, whole: float | None) -> str:
    """Return `most of it`, or `the largest part` where that is less than half of the whole."""
    is_most = largest is None or whole is None or 2 * largest >= whole
    return "most of it" if is_most else "the largest part"


def part_words(part: str) -> str:
    """Return a part of a run's wall time in words."""
    return _PARTS.get(part, part)


def short_label(phase: str) -> str:
    """Return a phase's name for a narrow column."""
    return _SHORT_LABELS.get(phase) or phase_label(phase)


def error_text(error: BaseException) -> str:
    """Return the type and the text of an exception of a user's code, whose `__str__` may raise anything."""
    kind = type(error).__name__
    try:
        return f"{kind}: {error}"
    except Exception as broken:  # noqa: BLE001 - see above
        return f"{kind}: <its text failed: {type(broken).__name__}>"


def exception_line(exception: str) -> str:
    """Return an exception's first line without colors; if that ends with a colon, with the line that it announces."""
    lines = [stripped for line in _COLORS.sub("", exception).splitlines() if (stripped := line.strip())]
    shown = lines[:2] if lines and lines[0].endswith(":") else lines[:1]
    return " ".join(shown)


def short_exception(exception: str) -> str:
    """Return `exception_line` cut to a length that fits into a sentence."""
    return cut_text(exception_line(exception), _EXCEPTION_CHARS)


def phase_words(phase: str) -> str:
    """Return a phase's name for a sentence; a user's phase in quotes."""
    if phase in _PHASES:
        return _PHASES[phase][1]

    own = phase.removeprefix("phase ")  # one that is called like a known phase is kept apart by this prefix
    return f"phase '{own if own in _PHASES else phase}'"


def phases_text(phases: Sequence[str], line: str | None) -> str:
    """Return where time is spent in words: `train.py:23 play, forward and backward`, with a line of the first phase."""
    first, *others = map(phase_words, phases)
    *before, last = [line or first, *others]
    return f"{', '.join(before)} and {last}" if before else last


def line_text(file: str, line: int, function: str, lines: Sequence[int] | None = None) -> str:
    """Return a line of code in words: `train.py:23 update_metric`, or `train.py:23 main (lines 20-24)`."""
    name = file.rpartition("/")[2]
    within = f" (lines {lines[0]}-{lines[1]})" if lines else ""
    where = "" if function == "<module>" else f" {function.replace('.<locals>', '')}"
    return f"{name}:{line}{where}{within}"


def place_words(file: str | None, line: int | None, function: str | None) -> str:
    """Return a place in words, `train.py:23 load`; empty if unknown."""
    return line_text(file, line, function) if file and line and function else ""


def parsed_place(text: str | None) -> tuple[str | None, int | None, str | None]:
    """Return (file, line, function) of `FILE:LINE FUNCTION`."""
    if not text:
        return None, None, None

    place, _, function = text.rpartition(" ")
    file, _, line = place.rpartition(":")
    return (file, int(line), function) if line.isdecimal() else (None, None, None)


def place_text(place: str, room: int) -> str:
    """Return a line of code, `FILE:LINE FUNCTION`, in some columns: the middle of a long path is left out.

    The file's name, the line and the function always stay.
    """
    if len(place) <= room or "/" not in place:
        return place

    folder, _, name = place.rpartition("/")
    left = room - len(name) - len(_ELIDED)
    first = folder.split("/")[1] if folder.startswith("/") else folder.split("/")[0]
    head = f"/{first}" if folder.startswith("/") else first
    kept = ""
    for part in reversed(folder.split("/")):
        if len(head) + 1 + len(part) + 1 + len(kept) > left:
            break

        kept = f"{part}/{kept}"

    return f"{head}/{_ELIDED}{kept}{name}" if kept or len(head) < left else f"{_ELIDED}{name}"


def library_text(text: str) -> str:
    """Return `torch/nn/functional.py:12 relu` of a library's function, without the folder of packages."""
    return _PACKAGES_FOLDER.sub("", text, count=1)


def summed_text(ranks: int) -> str:
    """Return the ranks whose steps are all in the figures of merged hosts, in words."""
    return f"step times and phases are of all steps of {plural(ranks, 'rank')}"


def sample_text(diagnosed: int, count: int) -> str:
    """Return the steps that a long run's figures cover: `verdict from 12,800 of 1,000,000 steps, spread ...`."""
    steps = f"{count_text(diagnosed)} of {count_text(count)} steps"
    return f"verdict from {steps}, spread over the run; means are of all steps"
