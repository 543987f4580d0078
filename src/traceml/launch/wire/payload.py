"""Values on their way between processes: cloudpickle, with the memory of tensors and arrays beside the pickle.

A parcel in bytes is `<8sQI` (magic, length of the pickle, number of buffers), a `<Q` length per buffer, the pickle, and
the buffers, each at a multiple of 64 bytes. Buffers are never joined or copied on the sending side, and are used where
they lie on the receiving side: a tensor of a received value is a piece of the memory that the parcel was read into.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from traceml.errors import PayloadError
from traceml.launch.wire.payload_buffer import LARGE_BYTES, PayloadBuffer, can_reach, map_private, path_of
from traceml.launch.wire.pickling import Pieces, Reader, Unpickler, pickler_class, remade_exception

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "LARGE_BYTES",
    "PayloadBuffer",
    "SerializedValue",
    "can_reach",
    "dump",
    "dump_call",
    "dump_exception",
    "load",
    "map_private",
    "path_of",
]

_HEAD = struct.Struct("<8sQI")
_LENGTH = struct.Struct("<Q")
_MAGIC = b"traceml\x01"
_ALIGN_BYTES = 64
# Smaller buffers lie in the pickle and are copied at their arrival: they own their memory and hold no mapping alive.
_INLINE_BYTES = 64 * 1024


class SerializedValue:
    """A pickled value, ready to be sent.

    It refers to the value's memory: what is changed before the parcel has left may arrive changed.

    Attributes:
        size_bytes: what `chunks` add up to.
    """

    def __init__(self, pickled: list[Any], buffers: list[pickle.PickleBuffer], kept: list[Any]) -> None:
        self._kept = kept  # what owns the memory that the buffers point to
        self._buffers = [buffer.raw() for buffer in buffers]
        self._pickled = [memoryview(piece).cast("B") for piece in pickled]
        pickle_bytes = sum(map(len, self._pickled))
        sizes = [len(buffer) for buffer in self._buffers]
        table = b"".join(map(_LENGTH.pack, sizes))
        self._head = memoryview(_HEAD.pack(_MAGIC, pickle_bytes, len(sizes)) + table)
        self._offsets, end = _offsets(len(self._head) + pickle_bytes, sizes)
        self.size_bytes = end

    def __repr__(self) -> str:
        return f"SerializedValue(size_bytes={self.size_bytes}, buffers={len(self._buffers)})"

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes in order, by reference."""
        yield self._head
        yield from self._pickled
        at = len(self._head) + sum(map(len, self._pickled))
        for offset, buffer in zip(self._offsets, self._buffers, strict=True):
            if offset > at:
                yield memoryview(bytes(offset - at))

            yield buffer
            at = offset + len(buffer)

    def __bytes__(self) -> bytes:
        return b"".join(self.chunks())


def dump(value: object, *, what: str = "the value") -> SerializedValue:
    """Pickle `value` without copying its tensors and arrays.

    Args:
        value: anything that cloudpickle takes; functions and classes of `__main__`, lambdas, closures go by value.
        what: what to call it in an error, as "the result".

    Raises:
        PayloadError: something in it cannot be pickled; the text names where that lies.
    """
    return _dump(value, {what: value})


def dump_call(func: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]) -> SerializedValue:
    """Pickle a call as `(func, args, kwargs)`.

    Raises:
        PayloadError: something in it cannot be pickled; the text names the argument and where in it that lies.
    """
    from traceml.launch.wire.culprit import name_arguments

    args, kwargs = tuple(args), dict(kwargs)
    function = f"function {getattr(func, '__name__', type(func).__name__)!r}"
    return _dump((func, args, kwargs), {function: func, **name_arguments(func, args, kwargs)})


def dump_exception(error: BaseException) -> SerializedValue | None:
    """Pickle an exception; None when it would not arrive as what it is."""
    for value in (error, _Bare(error)):
        try:
            parcel = _dump(value, {})
            arrived = load(bytearray(bytes(parcel)))
        except PayloadError:
            continue

        if type(arrived) is type(error):
            return parcel

    return None


class _Bare:
    """An exception without those of its attributes that cannot be pickled."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __reduce__(self) -> tuple[Any, ...]:
        attributes = {name: value for name, value in vars(self._error).items() if _try(value) is None}
        return remade_exception, (type(self._error), self._error.args), attributes or None


def load(memory: Buffer, *, what: str = "the value", on_made: Callable[[Any], object] | None = None) -> Any:
    """Unpickle a parcel; tensors and arrays keep using `memory`, which must be writable if they are to be.

    Args:
        memory: the bytes of a parcel.
        what: what to call it in an error.
        on_made: called with each function and class that came by value.

    Raises:
        PayloadError: the bytes are no parcel, or something in it does not exist here.
    """
    view = memoryview(memory)
    pickled, buffers = _split(view, what)
    try:
        return Unpickler(Reader(pickled), buffers=buffers, on_made=on_made).load()
    except Exception as error:
        raise PayloadError(_advice(what, error)) from error


def _advice(what: str, error: Exception) -> str:
    text = f"{what} cannot be unpickled here: {type(error).__name__}: {error}"
    if "process group has not been initialized" in text:
        text += " A model wrapped by DistributedDataParallel lives in its process group: return its .module instead."

    if isinstance(error, ImportError | AttributeError):
        text += (
            ". Functions and classes of modules are looked up by name where they arrive: the module must be found "
            "there (same folder, or PYTHONPATH) in the same version; or send it along by "
            "cloudpickle.register_pickle_by_value(module)"
        )

    return text


def _dump(value: object, named: Mapping[str, object]) -> SerializedValue:
    pickled: list[Any] = []
    buffers: list[pickle.PickleBuffer] = []

    def outside(buffer: pickle.PickleBuffer) -> bool:
        if buffer.raw().nbytes < _INLINE_BYTES:
            return True

        buffers.append(buffer)
        return False

    pickler = pickler_class()(Pieces(pickled), outside)
    try:
        pickler.dump(value)
    except Exception as error:
        from traceml.launch.wire.culprit import find_culprit

        raise PayloadError(find_culprit(named, error, _try)) from error

    return SerializedValue(pickled, buffers, pickler.kept)


def _try(value: object) -> Exception | None:
    """Return why `value` cannot be pickled."""
    try:
        pickler_class()(Pieces(None), lambda _buffer: False).dump(value)
    except Exception as error:  # noqa: BLE001 - pickling runs any code of any class
        return error

    return None


def _split(view: memoryview, what: str) -> tuple[memoryview, list[memoryview]]:
    try:
        magic, pickle_bytes, count = _HEAD.unpack_from(view)
        sizes = [length for (length,) in _LENGTH.iter_unpack(view[_HEAD.size : _HEAD.size + count * _LENGTH.size])]
    except struct.error as error:
        raise PayloadError(f"{what} has {len(view)} bytes, which are not even a parcel's head") from error

    start = _HEAD.size + count * _LENGTH.size
    offsets, end = _offsets(start + pickle_bytes, sizes)
    if magic != _MAGIC or len(sizes) != count or end > len(view):
        raise PayloadError(f"{what} is no parcel of this version: it begins with {bytes(view[:8])!r}")

    buffers = [view[offset : offset + size] for offset, size in zip(offsets, sizes, strict=True)]
    return view[start : start + pickle_bytes], buffers


def _offsets(start: int, sizes: Sequence[int]) -> tuple[list[int], int]:
    """Return where the buffers lie, and where the last one ends."""
    offsets, at = [], start
    for size in sizes:
        offset = -(-at // _ALIGN_BYTES) * _ALIGN_BYTES
        offsets.append(offset)
        at = offset + size

    return offsets, at
