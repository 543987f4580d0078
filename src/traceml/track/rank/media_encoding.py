"""Images and histograms from arrays, tensors and figures. No library is imported for it."""

from __future__ import annotations

import io
import math
import operator
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

from traceml.database.file_contents import Content, LaterBytes, Pixels, encode_array
from traceml.errors import ArgumentTypeError, UsageError
from traceml.inspection.loaded_modules import loaded_module
from traceml.track.rank.logged_values import PlainList, copied_to_host, whole_of

__all__ = ["histogram_of", "image_of"]

_MAX_BINS = 65_536
"""Intervals of a histogram; its row must fit into a frame."""
_CHUNK_VALUES = 1 << 18  # of a tensor, counted at once
_MAGIC = ((b"\x89PNG\r\n\x1a\n", ".png"), (b"\xff\xd8\xff", ".jpg"), (b"GIF8", ".gif"))


def image_of(image: Any, limit_bytes: int) -> tuple[Content, str]:
    """Return the contents of an image, and the file's suffix. Data that may change is copied now.

    Args:
        image: see `traceml.log_image`.
    """
    if isinstance(image, str | os.PathLike):
        data = Path(image).read_bytes()
        return data, _suffix_of(data) or Path(image).suffix
    if isinstance(image, bytes | bytearray):
        data = bytes(image)
        return data, _suffix_of(data) or ".png"
    if hasattr(image, "savefig"):  # a figure is drawn now: its library is not thread-safe
        buffer = io.BytesIO()
        image.savefig(buffer, format="png")
        return buffer.getvalue(), ".png"
    if hasattr(image, "getbands") and hasattr(image, "tobytes"):
        return _pixels_of_pil(image), ".png"
    if hasattr(image, "detach") and hasattr(image, "numel"):  # a file has `detach`, too
        return _pixels_of_tensor(image, limit_bytes), ".png"
    if hasattr(image, "__array_interface__") or hasattr(image, "tolist"):
        return _pixels_of_array(image, limit_bytes), ".png"

    kind = type(image).__name__
    raise ArgumentTypeError(f"an image must be an array, a tensor, a PIL image, a figure, or a file; not {kind}")


def _pixels_of_pil(image: Any) -> Pixels:
    mode = image.mode if image.mode in ("L", "LA", "RGB", "RGBA") else "RGBA" if "A" in image.getbands() else "RGB"
    converted = image.convert(mode)
    return Pixels(converted.tobytes(), "|u1", (converted.height, converted.width, len(converted.getbands())))


def _pixels_of_tensor(tensor: Any, limit_bytes: int) -> Content:
    """Return the pixels; of a tensor on a device a function, which waits for the copy."""
    tensor = _whole(tensor, "an image")
    if tensor.device.type == "cpu":
        with suppress(Exception):  # a sparse one, for example: the thread that encodes it says why it is refused
            return _pixels_of(_on_host(tensor), channels_first=True)

    fetch = _fetch_tensor(tensor)
    size_bytes = tensor.numel() * tensor.element_size()
    return LaterBytes(lambda: encode_array(fetch(), limit_bytes, channels_first=True), size_bytes)


def _pixels_of_array(array: Any, limit_bytes: int) -> Content:
    numpy = loaded_module("numpy")
    if numpy is not None and type(array) is numpy.ndarray and array.dtype.kind in "biuf":
        return _pixels_of(array)

    copy = array.copy() if hasattr(array, "copy") else array
    return LaterBytes(lambda: encode_array(copy, limit_bytes), int(getattr(copy, "nbytes", 0)))


def _pixels_of(array: Any, *, channels_first: bool = False) -> Pixels:
    return Pixels(array.tobytes(), array.dtype.str, array.shape, channels_first)


def histogram_of(values: Any, bins: int) -> tuple[list[int], list[float], int]:
    """Return (counts, edges, number of values that are not finite) for `bins` intervals of equal width.

    Raises:
        ArgumentTypeError: not all values are numbers.
        UsageError: `bins` is no whole number from 1 to 65,536.
    """
    if not isinstance(bins, SupportsIndex) or not 1 <= operator.index(bins) <= _MAX_BINS:
        raise UsageError(f"a histogram must have 1 to {_MAX_BINS:,} intervals, not {bins!r:.100}")

    if hasattr(values, "detach"):
        return _row_of(*_counted_by_torch(values, bins))

    if isinstance(values, Iterable) and not isinstance(values, Sequence) and not hasattr(values, "__array__"):
        values = list(values)

    try:
        return _row_of(*_counted(values, bins))
    except (TypeError, ValueError):
        raise ArgumentTypeError(
            f"a histogram must be made of numbers, not {type(values).__name__} {values!r:.100}"
        ) from None


def _row_of(counts: list[int], edges: list[float], not_finite: int) -> tuple[list[int], list[float], int]:
    """Mark the lists, which have no more than `_MAX_BINS` items, as ready for the row."""
    return PlainList(counts), PlainList(edges), not_finite


def _counted_by_torch(values: Any, bins: int) -> tuple[list[int], list[float], int]:
    torch = sys.modules["torch"]
    if values.layout is not torch.strided or values.is_meta:
        dense = ": to_dense() makes one" * str(values.layout).startswith("torch.sparse")
        kind = "one without data" if values.is_meta else f"a {values.layout} one{dense}"
        raise ArgumentTypeError(f"a histogram must be made of a dense tensor, not of {kind}")

    # On a device, doubles of it could be too large for the memory left.
    flat = _whole(values, "a histogram").cpu().reshape(-1)
    low, high, number = math.inf, -math.inf, 0
    for finite in _finite_chunks(flat):
        if finite.numel():
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
            number += finite.numel()

    value_range = _HistogramRange.of(low, high, bins) if number else _UNIT
    counts = torch.zeros(bins, dtype=torch.long, device="cpu")  # the script may have another default
    for finite in _finite_chunks(flat):
        at = (value_range.places(finite) * bins).long().clamp_(max=bins - 1)
        counts += torch.bincount(at, minlength=bins)

    return counts.tolist(), value_range.edges(bins), flat.numel() - number


def _whole(tensor: Any, what: str) -> Any:
    """Return a tensor with all its values on this rank.

    Raises:
        ArgumentTypeError: this rank has a part of them.
    """
    whole = whole_of(tensor.detach())
    if whole is None:
        raise ArgumentTypeError(
            f"{what} must be made of a whole tensor, not of a {type(tensor).__name__} of which each rank has a part: "
            "full_tensor() makes one, if all ranks call it; to_local() is the part"
        )

    return whole


def _finite_chunks(flat: Any) -> Iterator[Any]:
    """Yield the finite values of a tensor as doubles, a part at a time."""
    torch = sys.modules["torch"]
    for part in flat.split(_CHUNK_VALUES):
        doubles = part.double()
        is_finite = torch.isfinite(doubles)
        yield doubles if is_finite.all() else doubles[is_finite]  # a selection takes longer than all the rest


def _counted(values: Any, bins: int) -> tuple[list[int], list[float], int]:
    numpy = loaded_module("numpy")
    if numpy is not None:
        array = numpy.asarray(values, dtype=float).reshape(-1)
        finite = array[numpy.isfinite(array)]
        value_range = _HistogramRange.of(float(finite.min()), float(finite.max()), bins) if len(finite) else _UNIT
        with numpy.errstate(all="ignore"):  # the script may have them raise
            at = numpy.minimum((value_range.places(finite) * bins).astype(int), bins - 1)

        return numpy.bincount(at, minlength=bins).tolist(), value_range.edges(bins), len(array) - len(finite)

    numbers = [float(value) for value in values]
    kept = [value for value in numbers if math.isfinite(value)]
    value_range = _HistogramRange.of(min(kept), max(kept), bins) if kept else _UNIT
    counted = [0] * bins
    for value in kept:
        counted[min(int(value_range.places(value) * bins), bins - 1)] += 1

    return counted, value_range.edges(bins), len(numbers) - len(kept)


class _HistogramRange(NamedTuple):
    """Range of a histogram.

    `numpy.histogram` refuses one whose intervals are narrower than the distance of two numbers, as of weights that
    are nearly equal, and one that is wider than the largest number.
    """

    low: float
    high: float

    @classmethod
    def of(cls, low: float, high: float, bins: int) -> _HistogramRange:
        """Return the range of values; of equal ones, a range around them."""
        if high > low:
            return cls(low, high)

        reach, largest = max(0.5, bins * math.ulp(low)), sys.float_info.max
        return cls(max(low - reach, -largest), min(high + reach, largest))

    def places(self, values: Any) -> Any:
        """Return where values are in it, from 0 to 1."""
        scale = self._scale
        return (values * scale - self.low * scale) / (self.high * scale - self.low * scale)

    def edges(self, bins: int) -> list[float]:
        """Return the bounds of intervals of equal width."""
        scale = self._scale
        low, width = self.low * scale, self.high * scale - self.low * scale
        return [(low + width * number / bins) / scale for number in range(bins)] + [self.high]

    @property
    def _scale(self) -> float:
        """Factor with which the width, and that of all intervals together, is no infinite number."""
        return 1.0 if math.isfinite((self.high - self.low) * _MAX_BINS) else 0.5 / _MAX_BINS


_UNIT = _HistogramRange(0.0, 1.0)


def _suffix_of(data: bytes) -> str:
    return next((suffix for magic, suffix in _MAGIC if data.startswith(magic)), "")


def _fetch_tensor(tensor: Any) -> Callable[[], Any]:
    """Start copying a tensor without waiting for its device; return a function that gives it as an array."""
    copy, event = copied_to_host(tensor)

    def fetch() -> Any:
        if event is not None:
            event.synchronize()

        return _on_host(copy.cpu())

    return fetch


def _on_host(tensor: Any) -> Any:
    return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
