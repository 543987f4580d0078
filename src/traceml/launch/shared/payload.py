"""Serialization of values between processes: cloudpickle, with the memory of tensors and arrays outside the pickle.

A serialized value is `<8sQI` (magic, length of the pickle, number of buffers), a `<Q` length per buffer, the pickle,
and the buffers, each at a multiple of 64 bytes. Buffers are not copied: the sender sends them from where they are, and
a received tensor uses the memory that the value was received into. What lies between them passes values on unread.

Process: launcher, zygote and workers.
"""

from __future__ import annotations

import inspect
import pickle
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from traceml.errors import PayloadError
from traceml.launch.shared.pickling import PickleSink, PickleSource, Unpickler, pickler_class, rebuild_exception

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["SerializedValue", "dump", "dump_call", "dump_exception", "load"]

_HEAD = struct.Struct("<8sQI")
_LENGTH = struct.Struct("<Q")
_MAGIC = b"traceml\x01"
_ALIGN_BYTES = 64
# Smaller buffers stay inside the pickle and are copied on arrival: they own their memory and hold no mapping open.
_INLINE_BYTES = 64 * 1024


class SerializedValue:
    """A pickled value, ready to be sent.

    It refers to the value's memory: changes made before it is sent may arrive.
    """

    def __init__(self, pickled: list[Any], buffers: list[pickle.PickleBuffer], owners: list[Any]) -> None:
        self._owners = owners  # keeps the memory of the buffers alive
        self._buffers = [buffer.raw() for buffer in buffers]
        self._pickled = [memoryview(piece).cast("B") for piece in pickled]
        pickle_bytes = sum(map(len, self._pickled))
        sizes = [len(buffer) for buffer in self._buffers]
        table = b"".join(map(_LENGTH.pack, sizes))
        self._head = memoryview(_HEAD.pack(_MAGIC, pickle_bytes, len(sizes)) + table)
        self._offsets, self.size_bytes = _offsets(len(self._head) + pickle_bytes, sizes)

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
        value: any value that cloudpickle accepts; functions and classes of `__main__`, lambdas, closures go by value.
        what: name of the value in an error, such as "the result".

    Raises:
        PayloadError: it cannot be pickled.
    """
    return _dump(value, {what: value})


def dump_call(func: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]) -> SerializedValue:
    """Pickle a call as `(func, args, kwargs)`.

    Raises:
        PayloadError: the function or an argument cannot be pickled; the text names it.
    """
    args, kwargs = tuple(args), dict(kwargs)
    function = f"function {getattr(func, '__name__', type(func).__name__)!r}"
    return _dump((func, args, kwargs), {function: func, **_name_arguments(func, args, kwargs)})


def dump_exception(error: BaseException) -> SerializedValue | None:
    """Pickle an exception; return None if it would arrive as another type."""
    for value in (error, _WithoutUnpicklable(error)):
        try:
            serialized = _dump(value, {})
            arrived = load(bytearray(bytes(serialized)))
        except PayloadError:
            continue

        if type(arrived) is type(error):
            return serialized

    return None


class _WithoutUnpicklable:
    """An exception without those of its attributes that cannot be pickled."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __reduce__(self) -> tuple[Any, ...]:
        attributes = {name: value for name, value in vars(self._error).items() if _pickling_error(value) is None}
        return rebuild_exception, (type(self._error), self._error.args), attributes or None


def load(memory: Buffer, *, what: str = "the value", on_made: Callable[[Any], object] | None = None) -> Any:
    """Unpickle a value; its tensors and arrays keep using `memory`, and are writable if it is.

    Args:
        on_made: called with each function and class that came by value.

    Raises:
        PayloadError: the bytes are not a serialized value, or a part of it does not exist here.
    """
    pickled, buffers = _split(memoryview(memory), what)
    try:
        return Unpickler(PickleSource(pickled), buffers=buffers, on_made=on_made).load()
    except Exception as error:
        raise PayloadError(_loading_advice(what, error)) from error


def _loading_advice(what: str, error: Exception) -> str:
    text = f"{what} cannot be unpickled here: {type(error).__name__}: {error}"
    if "process group has not been initialized" in text:
        text += " A model wrapped by DistributedDataParallel needs its process group: return its .module instead."

    if isinstance(error, ImportError | AttributeError):
        text += (
            ". Functions and classes of modules are looked up by name where they arrive: the module must be found "
            "there (same folder, or PYTHONPATH) in the same version; or send it along by "
            "cloudpickle.register_pickle_by_value(module)"
        )

    return text


def _dump(value: object, named: Mapping[str, object]) -> SerializedValue:
    """Pickle a value.

    Args:
        named: its parts by name, for an error.
    """
    pickled: list[Any] = []
    buffers: list[pickle.PickleBuffer] = []

    def in_band(buffer: pickle.PickleBuffer) -> bool:
        if buffer.raw().nbytes < _INLINE_BYTES:
            return True

        buffers.append(buffer)
        return False

    pickler = pickler_class()(PickleSink(pickled), in_band)
    try:
        pickler.dump(value)
    except Exception as error:
        raise PayloadError(_unpicklable(named, error)) from error

    return SerializedValue(pickled, buffers, pickler.kept)


def _unpicklable(named: Mapping[str, object], error: Exception) -> str:
    """Return an error text that names the part that cannot be pickled."""
    for name, value in named.items():
        if (cause := _pickling_error(value)) is not None:
            return f"{name}: {_reason(cause)}"

    return _reason(error)


_PICKLING_ADVICE = (
    ". Locks, open files, sockets, generators and threads cannot be sent between processes: make them where they are "
    "used, or send what they are made from"
)


def _pickling_error(value: object) -> Exception | None:
    """Return the error of pickling `value`, or None."""
    try:
        pickler_class()(PickleSink(None), lambda _buffer: False).dump(value)
    except Exception as error:  # noqa: BLE001 - pickling runs any code of any class
        return error

    return None


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError) or isinstance(error.__cause__, RecursionError):
        return "it is nested too deeply to be pickled; send it as flat lists or arrays"

    text = str(error)
    known = text if "pickle" in text else f"cannot be pickled ({type(error).__name__}: {text})"
    return f"{known}{_PICKLING_ADVICE}"


def _name_arguments(
    func: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]
) -> dict[str, object]:
    """Return the arguments of a call by the names of their parameters."""
    try:
        parameters = list(inspect.signature(func).parameters.values())
    except (TypeError, ValueError):
        parameters = []

    names = [p.name for p in parameters if p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}]
    named = {f"argument {names[i]!r}" if i < len(names) else f"argument {i}": value for i, value in enumerate(args)}
    return named | {f"argument {name!r}": value for name, value in kwargs.items()}


def _split(view: memoryview, what: str) -> tuple[memoryview, list[memoryview]]:
    """Return the pickle and the buffers of a serialized value."""
    try:
        magic, pickle_bytes, count = _HEAD.unpack_from(view)
        sizes = [length for (length,) in _LENGTH.iter_unpack(view[_HEAD.size : _HEAD.size + count * _LENGTH.size])]
    except struct.error as error:
        raise PayloadError(f"{what} has {len(view)} bytes: too few for a serialized value") from error

    start = _HEAD.size + count * _LENGTH.size
    offsets, end = _offsets(start + pickle_bytes, sizes)
    if magic != _MAGIC or len(sizes) != count or end > len(view):
        raise PayloadError(f"{what} is not a serialized value of this version: it begins with {bytes(view[:8])!r}")

    buffers = [view[offset : offset + size] for offset, size in zip(offsets, sizes, strict=True)]
    return view[start : start + pickle_bytes], buffers


def _offsets(start: int, sizes: Sequence[int]) -> tuple[list[int], int]:
    """Return the offsets of the buffers, and the end of the last one."""
    offsets, at = [], start
    for size in sizes:
        offset = -(-at // _ALIGN_BYTES) * _ALIGN_BYTES
        offsets.append(offset)
        at = offset + size

    return offsets, at
