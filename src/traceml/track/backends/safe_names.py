"""Names that a tracker accepts, made from any name, with different results for different names."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

__all__ = [
    "NO_PATH",
    "NO_TEXT",
    "flattened",
    "json_number",
    "merged_tags",
    "plain_value",
    "safe_file_name",
    "safe_name",
    "safe_path",
    "utf8_text",
]

NO_TEXT = re.compile("[\0\ud800-\udfff]")
"""Characters that a text in a database cannot have: NUL, and lone surrogates, which UTF-8 has not."""
NO_PATH = re.compile(NO_TEXT.pattern + r"|^/|/$|//|(?<![^/])\.{1,2}(?![^/])")
"""What a path below a folder cannot have, beside that: empty parts, and those that lead out of it."""
_NO_FILE = re.compile(r"[/\0]")
_LONGEST_FILE = 180
_LONGEST_PART_BYTES = 200  # of a path: file systems take 255, and libraries add to some
_EXTENSION = re.compile(r"(?<=[^/])\.\w{1,10}$")


@lru_cache(maxsize=1 << 17)  # a run may have 100,000 names, one per row
def safe_name(name: str, refused: re.Pattern[str], longest: int) -> str:
    """Return `name` if it is accepted, else a similar unique one.

    Refused characters become `_`, and 8 digits of the name's hash are added: `a%b` and `a(b` stay different, and the
    same name gives the same result in every process, so that a resumed run continues under it.

    Args:
        refused: matches each part that the tracker refuses.
        longest: most characters that the tracker accepts.
    """
    if name and len(name) <= longest and not refused.search(name):
        return name

    digits = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    kept = refused.sub("_", name)[: longest - 9]
    # A cut may create something that is refused (`..`, a trailing slash).
    return refused.sub("_", f"{kept}~{digits}") if not refused.search("~") else refused.sub("_", f"{kept}_{digits}")


def safe_file_name(name: str) -> str:
    """Return a part of a file's name that stays in its folder, whatever `name` is; see `safe_name`."""
    return safe_name(name, _NO_FILE, _LONGEST_FILE)


def safe_path(path: str, refused: re.Pattern[str], longest: int) -> str:
    """Return the path of a file that file systems take, too, with the extension that it has; see `safe_name`."""
    safe = safe_name(path, refused, longest)
    if safe != path and (extension := _EXTENSION.search(path)) is not None:
        safe = safe_name(path[: extension.start()], refused, longest) + extension[0]

    return "/".join(map(_short_part, safe.split("/")))


def _short_part(part: str) -> str:
    """Return a part of a path as it is or, of a long one, the beginning, 8 digits of its hash and the extension."""
    data = part.encode("utf-8", "surrogatepass")
    if len(data) <= _LONGEST_PART_BYTES:
        return part

    extension = _EXTENSION.search(part)
    end = f"_{hashlib.sha256(data).hexdigest()[:8]}{extension[0] if extension is not None else ''}"
    return data[: _LONGEST_PART_BYTES - len(end.encode())].decode("utf-8", "ignore") + end


def flattened(params: Mapping[str, Any], separator: str) -> dict[str, Any]:
    """Return nested maps as one, with keys joined by `separator`; an empty map stays a value."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            flat |= {f"{key}{separator}{inner}": each for inner, each in flattened(value, separator).items()}
        else:
            flat[str(key)] = value

    return flat


def utf8_text(text: str) -> str:
    """Return a text that UTF-8 can hold: others of its characters, such as those of undecodable bytes, are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def plain_value(value: Any, key: Callable[[str], str] = utf8_text, largest: int | None = None) -> Any:
    """Return a value in a form that JSON and UTF-8 can hold.

    Args:
        key: makes the keys of maps.
        largest: integers must be below this number; others become texts.
    """
    if isinstance(value, int) and largest is not None and not -largest <= value < largest:
        return str(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {key(str(name)): plain_value(each, key, largest) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(each, key, largest) for each in value]

    return utf8_text(str(value))


def json_number(value: float) -> float | str:
    """Return a number as JSON holds it: NaN and the infinities, which JSON lacks, as text."""
    if math.isfinite(value):
        return value

    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def merged_tags(
    before: Iterable[str], tags: Mapping[str, str], separator: str, longest: int | None = None
) -> list[str]:
    """Return the tags of a run as texts: `key`, or `key` and value, in place of earlier values of the same keys.

    Args:
        before: texts that the run has.
        tags: values by key; "" and "true" are tags without a value.
        longest: texts are cut to this many characters.
    """

    def text(words: str) -> str:
        return utf8_text(words)[:longest]

    stale = tuple(text(f"{key}{separator}") for key in tags)
    kept = [tag for tag in before if tag not in tags and not tag.startswith(stale)]
    fresh = (text(key if value in {"", "true"} else f"{key}{separator}{value}") for key, value in tags.items())
    return [*kept, *(tag for tag in fresh if tag and tag not in kept)]
