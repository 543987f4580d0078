"""Pickler and unpickler that do not copy the memory of tensors.

All torch tensors (parameters, views that share memory, sparse and quantized ones) reduce to their storages, so only
storages are handled here. Unpickling imports torch only if the value needs it.

Process: launcher, zygote and workers, through `payload`.
"""

from __future__ import annotations

import contextlib
import ctypes
import pickle
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

from traceml.inspection.loaded_modules import loaded_module

__all__ = ["PickleSink", "PickleSource", "Unpickler", "pickler_class", "rebuild_exception"]

# Classes of this process that were sent by value: one that comes back is the same class and is not modified.
_sent_classes: weakref.WeakSet[type] = weakref.WeakSet()


class PickleSink:
    """A file that keeps the written pieces by reference, or drops them."""

    __slots__ = ("write",)

    def __init__(self, pieces: list[Any] | None) -> None:
        self.write: Callable[[Any], object] = len if pieces is None else pieces.append


class PickleSource:
    """A file over memory that copies only the requested bytes."""

    __slots__ = ("_at", "_view")

    def __init__(self, view: memoryview) -> None:
        self._view, self._at = view, 0

    def read(self, n: int) -> bytes:
        """Return the next `n` bytes."""
        start, self._at = self._at, min(self._at + n, len(self._view))
        return bytes(self._view[start : self._at])

    def readinto(self, target: Any) -> int:
        """Fill `target`, allocated by the unpickler; return the number of bytes."""
        into = memoryview(target).cast("B")
        piece = self._view[self._at : self._at + len(into)]
        into[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def readline(self) -> bytes:
        """Return a line; only old opcodes need them."""
        line = bytes(self._view[self._at : self._at + 4096]).partition(b"\n")
        found = line[0] + line[1]
        self._at += len(found)
        return found


class Unpickler(pickle.Unpickler):
    """Unpickler that does not modify classes that this process has sent.

    Args:
        buffers: the buffers outside the pickle.
        on_made: called with each function and class that came by value.
    """

    def __init__(self, file: PickleSource, *, buffers: Sequence[Any], on_made: Callable[[Any], object] | None) -> None:
        super().__init__(file, buffers=buffers)
        self._on_made = on_made or (lambda _: None)

    def find_class(self, module: str, name: str) -> Any:
        """Return the object that a pickle names."""
        found = super().find_class(module, name)
        if module.startswith("cloudpickle") and name in {"_class_setstate", "_function_setstate"}:
            return self._set_state(found)

        return found

    def _set_state(self, set_state: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def apply(made: Any, state: Any) -> Any:
            # cloudpickle finds the sent class again, but would replace its methods by copies with other globals
            done = made if isinstance(made, type) and made in _sent_classes else set_state(made, state)
            self._on_made(made)
            return done

        return apply


class _Untyped:
    """The memory of tensors of any type."""

    __slots__ = ("storage",)

    def __init__(self, storage: Any) -> None:
        self.storage = storage


_pickler_class: Any = None


def pickler_class() -> Any:
    """Return the pickler's class, made on first use: an agent never needs cloudpickle."""
    global _pickler_class
    if _pickler_class is not None:
        return _pickler_class

    import cloudpickle

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def __init__(self, file: PickleSink, in_band: Callable[[pickle.PickleBuffer], bool]) -> None:
            super().__init__(file, protocol=5, buffer_callback=in_band)
            self.kept: list[Any] = []
            self._storages: dict[int, _Untyped] = {}
            torch = loaded_module("torch")
            self._storage_types = (torch.UntypedStorage, torch.TypedStorage) if torch is not None else None

        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, _Untyped):
                return self._reduce_untyped(obj.storage)

            if self._storage_types is not None and isinstance(obj, self._storage_types):
                return self._reduce_storage(obj)

            if isinstance(obj, BaseException) and type(obj).__reduce__ is BaseException.__reduce__:
                # pickle would call its __init__ with its text, which many do not accept, or extend
                return rebuild_exception, (type(obj), obj.args), obj.__dict__ or None

            reduced = super().reducer_override(obj)
            if isinstance(obj, type) and isinstance(reduced, tuple):
                _sent_classes.add(obj)

            return reduced

        def _reduce_storage(self, storage: Any) -> Any:
            # as torch pickles it: an untyped storage arrives as one of bytes; tensors of newer types rely on that
            untyped = getattr(storage, "_untyped_storage", storage)
            # tensors that share memory have separate storage objects; one of them is sent for all
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


def rebuild_exception(kind: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    """Make an exception again, without calling an initializer of the user's class."""
    error = kind.__new__(kind, *args)
    with contextlib.suppress(Exception):  # arguments of another signature: then `args` alone is set
        _init_of(kind)(error, *args)

    error.args = args
    return error


def _init_of(kind: type[BaseException]) -> Callable[..., None]:
    """Return the initializer of the built-in base class, which sets the attributes that its text is made of."""
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
