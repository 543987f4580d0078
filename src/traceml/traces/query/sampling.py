"""A look at the beginning of traces, for messages that say what there is."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable
from pathlib import Path

from traceml.traces.reader.trace_files import GZIP_MAGIC

__all__ = ["sampled_keys"]

_LOOKED_AT_BYTES = 1 << 20
_FILES = 4
_KEYS = 30
_ARGS = re.compile(r'"args"\s*:\s*(?=\{)')


def sampled_keys(paths: Iterable[Path]) -> list[str]:
    """Return keys of the `args` of events at the beginning of some traces, sorted."""
    keys: set[str] = set()
    decoder = json.JSONDecoder()
    for path in list(paths)[:_FILES]:
        text = _beginning(path)
        for place in _ARGS.finditer(text):
            try:
                keys |= decoder.raw_decode(text, place.end())[0].keys()
            except ValueError:
                continue  # damaged, or cut off by the end of the sample

    return sorted(keys)[:_KEYS]


def _beginning(path: Path) -> str:
    try:
        with path.open("rb") as file:
            zipped = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC

        with gzip.open(path) if zipped else path.open("rb") as file:
            return file.read(_LOOKED_AT_BYTES).decode("utf-8", "replace")
    except (OSError, EOFError, zlib.error):
        return ""
