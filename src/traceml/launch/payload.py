"""Values on their way between processes: cloudpickle, with the memory of tensors and arrays beside the pickle.

A parcel in bytes is `<8sQI` (magic, length of the pickle, number of buffers), a `<Q` length per buffer, the pickle, and
the buffers, each at a multiple of 64 bytes. Buffers are never joined or copied on the sending side, and are used where
they lie on the receiving side: a tensor of a received value is a piece of the memory that the parcel was read into.

torch tensors reduce to their storages, whatever their kind (parameters, views that share memory, sparse and quantised
ones); a storage is the one thing of torch that is handled here. torch is imported by what is unpickled, if at all.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import pickle
import struct
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from traceml.errors import PayloadError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "LARGE_BYTES",
    "Parcel",
    "Receiver",
    "can_reach",
    "dump",
    "dump_call",
    "dump_exception",
    "load",
    "map_private",
    "path_of",
]

# From this size on, processes of one host hand each other a file in memory, and not its bytes.
LARGE_BYTES = 1024 * 1024
_HEAD = struct.Struct("<8sQI")
_LENGTH = struct.Struct("<Q")
_MAGIC = b"traceml\x01"
_ALIGN_BYTES = 64
# Smaller buffers lie in the pickle and are copied at their arrival: they own their memory and hold no mapping alive.
_INLINE_BYTES = 64 * 1024

# Classes of this process that were sent by value: one that comes back is the one that went, and stays as it is.
_sent_classes: weakref.WeakSet[type] = weakref.WeakSet()


class Parcel:
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
        return f"Parcel(size_bytes={self.size_bytes}, buffers={len(self._buffers)})"

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


class Receiver:
    """Memory that a parcel is received into.

    Args:
        size_bytes: the parcel's size.
        shared: keep it in a file in memory, `fd`, which other processes can map (`map_private`); else in this
            process's own memory, for `load(receiver.memory())`.
    """

    def __init__(self, size_bytes: int, *, shared: bool = False) -> None:
        self.size_bytes = size_bytes
        self.received_bytes = 0
        self.fd: int | None = None
        self._memory: mmap.mmap | None = None
        if shared:
            self.fd = os.memfd_create("traceml-payload", os.MFD_CLOEXEC)
            os.ftruncate(self.fd, size_bytes)
            return

        self._memory = mmap.mmap(-1, max(1, size_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if size_bytes >= _INLINE_BYTES:
            self._memory.madvise(mmap.MADV_HUGEPAGE)  # 500 MB in 4 KiB pages are 122,000 faults

    @classmethod
    def of(cls, path: str) -> Receiver:
        """Return a complete one over a shared parcel of another process of this host, see `path`.

        Raises:
            OSError: it cannot be opened.
        """
        found = cls.__new__(cls)
        found._memory, found.fd = None, os.open(path, os.O_RDWR | os.O_CLOEXEC)
        found.size_bytes = found.received_bytes = os.fstat(found.fd).st_size
        return found

    @property
    def path(self) -> str:
        """Where other processes of this host find a shared parcel, while it is open here."""
        return path_of(self.fd)

    @property
    def complete(self) -> bool:
        """Whether all has come."""
        return self.received_bytes == self.size_bytes

    def feed(self, view: Buffer) -> None:
        """Take the next bytes.

        Raises:
            PayloadError: there are more than were announced.
        """
        view = memoryview(view)
        end = self.received_bytes + len(view)
        if end > self.size_bytes:
            raise PayloadError(f"a payload of {self.size_bytes} bytes has {end - self.size_bytes} bytes too many")

        if self._memory is not None:
            self._memory[self.received_bytes : end] = view
            self.received_bytes = end
            return

        assert self.fd is not None
        while self.received_bytes < end:
            n = os.pwrite(self.fd, view, self.received_bytes)
            self.received_bytes += n
            view = view[n:]

    def memory(self) -> mmap.mmap:
        """Return the received bytes, for `load`; values loaded from them keep them alive.

        Raises:
            PayloadError: something is missing.
        """
        if not self.complete:
            raise PayloadError(f"only {self.received_bytes} of {self.size_bytes} bytes of a payload came")

        if self._memory is None:
            assert self.fd is not None
            self._memory = mmap.mmap(self.fd, self.size_bytes)

        return self._memory

    def close(self) -> None:
        """Let go of the memory; values that were loaded from it live on."""
        self._memory = None
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def __del__(self) -> None:
        # an open file in memory keeps all of it, and a launch may end in many ways
        if getattr(self, "fd", None) is not None:
            self.close()


def path_of(fd: int | None) -> str:
    """Return the path by which other processes of this host reach an open file in memory."""
    return f"/proc/{os.getpid()}/fd/{fd}"


def can_reach(pid: int) -> bool:
    """Return whether files in memory of the process `pid` can be opened here."""
    try:
        os.readlink(f"/proc/{pid}/exe")  # noqa: PTH115 - asks the kernel what opening would ask
    except OSError:
        return False

    return True


def map_private(fd: int) -> mmap.mmap:
    """Map a shared parcel: its pages are those of all other processes that map it, until this one writes to them."""
    size = os.fstat(fd).st_size
    return mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def dump(value: object, *, what: str = "the value") -> Parcel:
    """Pickle `value` without copying its tensors and arrays.

    Args:
        value: anything that cloudpickle takes; functions and classes of `__main__`, lambdas, closures go by value.
        what: what to call it in an error, as "the result".

    Raises:
        PayloadError: something in it cannot be pickled; the text names where that lies.
    """
    return _dump(value, {what: value})


def dump_call(func: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]) -> Parcel:
    """Pickle a call as `(func, args, kwargs)`.

    Raises:
        PayloadError: something in it cannot be pickled; the text names the argument and where in it that lies.
    """
    from traceml.launch.culprit import name_arguments

    args, kwargs = tuple(args), dict(kwargs)
    function = f"function {getattr(func, '__name__', type(func).__name__)!r}"
    return _dump((func, args, kwargs), {function: func, **name_arguments(func, args, kwargs)})


def dump_exception(error: BaseException) -> Parcel | None:
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
        return _exception, (type(self._error), self._error.args), attributes or None


def load(memory: Buffer, *, what: str = "the value") -> Any:
    """Unpickle a parcel; tensors and arrays keep using `memory`, which must be writable if they are to be.

    Args:
        memory: the bytes of a parcel.
        what: what to call it in an error.

    Raises:
        PayloadError: the bytes are no parcel, or something in it does not exist here.
    """
    view = memoryview(memory)
    pickled, buffers = _split(view, what)
    try:
        return _Unpickler(_Reader(pickled), buffers=buffers).load()
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


def _dump(value: object, named: Mapping[str, object]) -> Parcel:
    pickled: list[Any] = []
    buffers: list[pickle.PickleBuffer] = []

    def outside(buffer: pickle.PickleBuffer) -> bool:
        if buffer.raw().nbytes < _INLINE_BYTES:
            return True

        buffers.append(buffer)
        return False

    pickler = _pickler()(_Pieces(pickled), outside)
    try:
        pickler.dump(value)
    except Exception as error:
        from traceml.launch.culprit import find_culprit

        raise PayloadError(find_culprit(named, error, _try)) from error

    return Parcel(pickled, buffers, pickler.kept)


def _try(value: object) -> Exception | None:
    """Return why `value` cannot be pickled."""
    try:
        _pickler()(_Pieces(None), lambda _buffer: False).dump(value)
    except Exception as error:  # noqa: BLE001 - pickling runs any code of any class
        return error

    return None


class _Pieces:
    """A file that keeps what is written, by reference."""

    __slots__ = ("write",)

    def __init__(self, pieces: list[Any] | None) -> None:
        self.write: Callable[[Any], object] = len if pieces is None else pieces.append


class _Reader:
    """A file over memory, which copies no more than it is asked for."""

    __slots__ = ("_at", "_view")

    def __init__(self, view: memoryview) -> None:
        self._view, self._at = view, 0

    def read(self, n: int) -> bytes:
        start, self._at = self._at, min(self._at + n, len(self._view))
        return bytes(self._view[start : self._at])

    def readinto(self, target: Any) -> int:
        into = memoryview(target).cast("B")
        piece = self._view[self._at : self._at + len(into)]
        into[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def readline(self) -> bytes:
        line = bytes(self._view[self._at : self._at + 4096]).partition(b"\n")
        found = line[0] + line[1]
        self._at += len(found)
        return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        return _set_class_state(found) if name == "_class_setstate" and module.startswith("cloudpickle") else found


def _set_class_state(set_state: Callable[[type, Any], type]) -> Callable[[type, Any], type]:
    # cloudpickle finds the class that went out, but would give it copies of its own methods, with globals of their own
    return lambda kind, state: kind if kind in _sent_classes else set_state(kind, state)


class _Untyped:
    """The memory of tensors, whatever their type."""

    __slots__ = ("storage",)

    def __init__(self, storage: Any) -> None:
        self.storage = storage


_pickler_class: Any = None


def _pickler() -> Any:
    """Return our pickler's class; made on first use, as cloudpickle costs an agent nothing that way."""
    global _pickler_class
    if _pickler_class is not None:
        return _pickler_class

    import cloudpickle

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def __init__(self, file: _Pieces, outside: Callable[[pickle.PickleBuffer], bool]) -> None:
            super().__init__(file, protocol=5, buffer_callback=outside)
            self.kept: list[Any] = []
            self._storages: dict[int, _Untyped] = {}
            torch = sys.modules.get("torch")
            self._storage_types = (torch.UntypedStorage, torch.TypedStorage) if torch is not None else None

        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, _Untyped):
                return self._reduce_untyped(obj.storage)

            if self._storage_types is not None and isinstance(obj, self._storage_types):
                return self._reduce_storage(obj)

            if isinstance(obj, BaseException) and type(obj).__reduce__ is BaseException.__reduce__:
                # as it is: pickle would call its __init__ with its text, which many do not take, or add to
                return _exception, (type(obj), obj.args), obj.__dict__ or None

            reduced = super().reducer_override(obj)
            if isinstance(obj, type) and isinstance(reduced, tuple):
                _sent_classes.add(obj)

            return reduced

        def _reduce_storage(self, storage: Any) -> Any:
            # as torch pickles it: an untyped one arrives as one of bytes; tensors of newer types count on that
            untyped = getattr(storage, "_untyped_storage", storage)
            # tensors that share memory have storages of their own in Python; one of them goes for all
            untyped = self._storages.setdefault(untyped._cdata, _Untyped(untyped))
            return _typed_storage, (untyped, getattr(storage, "dtype", sys.modules["torch"].uint8))

        def _reduce_untyped(self, storage: Any) -> Any:
            cpu = storage if storage.device.type == "cpu" else storage.cpu()
            self.kept.append(cpu)
            if not cpu.nbytes():
                return _storage, (b"", str(storage.device))

            memory = (ctypes.c_char * cpu.nbytes()).from_address(cpu.data_ptr())
            return _storage, (pickle.PickleBuffer(memory), str(storage.device))

    _pickler_class = Pickler
    return Pickler


def _exception(kind: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    error = kind.__new__(kind, *args)
    with contextlib.suppress(Exception):  # arguments that are not its own: then args has to do
        _init_of(kind)(error, *args)

    error.args = args
    return error


def _init_of(kind: type[BaseException]) -> Callable[..., None]:
    """Return the initialiser of the interpreter's own class, which sets what that prints."""
    own: Any = next(each for each in kind.__mro__ if each.__module__ == "builtins")
    return cast("Callable[..., None]", own.__init__)


def _typed_storage(untyped: Any, dtype: Any) -> Any:
    import torch

    return torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)


def _storage(memory: Any, device: str) -> Any:
    """Rebuild a storage over `memory`; where its device does not exist here, it stays on the CPU."""
    import torch

    if not len(memory):
        return torch.UntypedStorage(0)

    flat = torch.frombuffer(memory, dtype=torch.uint8)
    if device == "cpu":
        # what came inside the pickle gets memory of its own: aligned, and able to grow
        return (flat.clone() if isinstance(memory, bytearray) else flat).untyped_storage()

    kind = getattr(torch, device.partition(":")[0], None)
    index = int(device.partition(":")[2] or 0)
    there = kind is not None and kind.is_available() and index < kind.device_count()
    return (flat.to(device) if there else flat).untyped_storage()


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
