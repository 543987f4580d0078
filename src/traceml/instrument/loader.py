"""Waiting for batches: torch's DataLoader, and any other iterable that the user hands over."""

from __future__ import annotations

import weakref
from _thread import get_ident
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from traceml.clock import monotonic_ns
from traceml.instrument.clock import OTHER, StepClock
from traceml.instrument.patches import Patches

__all__ = ["LoaderToken", "TracedIterable", "patch_loaders"]

T = TypeVar("T")
_TAG = "_traceml_loader"


class LoaderToken:
    """Stands for one loader in the clock, which must keep none alive."""

    __slots__ = ()


class _Wait:
    """What a wait for a batch does to the clock, for loaders of torch and others."""

    __slots__ = ("clock",)

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock

    def begin(self, loader: Any) -> int:
        """Begin to wait; return the phase to go back to, or -1 when it does not count here."""
        clock = self.clock
        previous = clock.current
        if not previous or clock.thread != get_ident():
            return -1

        try:
            t = monotonic_ns()
            if clock.depth:
                previous = self._forget_optimizer()

            if previous != OTHER:
                clock.acc[previous] += t - clock.mark

            clock.mark = t
            if loader is clock.closes_at:
                clock.commit(t)
            else:
                clock.boundary(t, loader)

            clock.mark = t
            clock.current = 0
            clock.open_slots[0] = t
            if clock.device is not None:
                clock.device.mark(0)
        except Exception as error:  # noqa: BLE001 - fail open: counted and said by the clock
            clock.fail(error)

        return previous

    def end(self, previous: int, loader: Any, got: bool | None) -> None:
        """End to wait: a batch came, none is left (False), or only the iterator was made (None)."""
        clock = self.clock
        try:
            t = monotonic_ns()
            clock.acc[clock.current] += t - clock.mark
            clock.mark = t
            clock.current = previous
            clock.open_slots[0] = 0
            if clock.device is not None:
                clock.device.mark(previous)

            if got:
                clock.batches += 1
                if clock.batch is None:
                    clock.batch = loader
                    if clock.first_loader is None:
                        clock.first_loader = loader
            elif got is False:
                clock.exhausted()
        except Exception as error:  # noqa: BLE001 - fail open: counted and said by the clock
            clock.fail(error)

    def _forget_optimizer(self) -> int:
        """No batch is fetched inside an optimizer step: that one raised, and its end was never told."""
        clock = self.clock
        clock.acc[clock.current] += monotonic_ns() - clock.mark
        clock.depth = 0
        clock.current = OTHER
        clock.open_slots[4] = 0
        return OTHER


def patch_loaders(patches: Patches, clock: StepClock, on_loader: Callable[[Any], None]) -> None:
    """Time DataLoader's iterators.

    Args:
        patches: where the originals are kept.
        clock: whose time it is.
        on_loader: called with each loader when its first iterator is made.
    """
    from torch.utils.data import dataloader

    iterator_type: Any = dataloader._BaseDataLoaderIter
    original_next, original_iter = iterator_type.__next__, dataloader.DataLoader.__iter__
    wait = _Wait(clock)
    begin, end = wait.begin, wait.end
    tokens = _Tokens(on_loader)

    def __next__(self: Any) -> Any:  # noqa: N807 - the name that it stands in for
        loader = self._traceml_loader
        previous = begin(loader)
        if previous < 0:
            return original_next(self)

        got = False
        try:
            batch = original_next(self)
            got = True
            return batch
        finally:
            end(previous, loader, got)

    def __iter__(self: Any) -> Any:  # noqa: N807 - the name that it stands in for
        if clock.thread != get_ident() or not clock.current:
            return original_iter(self)

        loader = tokens.of(self)
        previous = begin(loader)
        try:
            iterator = original_iter(self)
        finally:
            end(previous, loader, None)

        try:
            setattr(iterator, _TAG, loader)
        except AttributeError:
            pass  # a subclass returns an iterator of its own kind: it is not timed by us

        return iterator

    patches.replace(iterator_type, _TAG, LoaderToken())
    patches.wrap(iterator_type, "__next__", __next__)
    patches.wrap(dataloader.DataLoader, "__iter__", __iter__)


class _Tokens:
    """One token per loader for as long as the loader lives."""

    def __init__(self, on_loader: Callable[[Any], None]) -> None:
        self._on_loader = on_loader
        self._tokens: weakref.WeakKeyDictionary[Any, LoaderToken] = weakref.WeakKeyDictionary()

    def of(self, loader: Any) -> LoaderToken:
        """Return the loader's token; make the loader known at first sight."""
        try:
            token = self._tokens.get(loader)
            if token is None:
                token = self._tokens[loader] = LoaderToken()
                self._on_loader(loader)
        except TypeError:  # a subclass that cannot be hashed: each of its iterators counts as another loader
            token = LoaderToken()

        return token


class TracedIterable(Generic[T]):
    """An iterable whose items are waited for: `input_wait`, and it bounds steps as a DataLoader does."""

    def __init__(self, iterable: Iterable[T], clock: StepClock) -> None:
        self._iterable, self._clock = iterable, clock
        self._token = LoaderToken()

    def __iter__(self) -> Iterator[T]:
        """Return a timed iterator."""
        wait = _Wait(self._clock)
        previous = wait.begin(self._token)
        try:
            iterator = iter(self._iterable)
        finally:
            if previous >= 0:
                wait.end(previous, self._token, None)

        return _TracedIterator(iterator, wait, self._token)

    def __len__(self) -> int:
        """Return the iterable's length, if it has one."""
        return len(self._iterable)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        # A loader has attributes that scripts use: `dataset`, `sampler.set_epoch(...)`.
        return getattr(self._iterable, name)


class _TracedIterator(Generic[T]):
    """One pass over a traced iterable."""

    __slots__ = ("_iterator", "_token", "_wait")

    def __init__(self, iterator: Iterator[T], wait: _Wait, token: LoaderToken) -> None:
        self._iterator, self._wait, self._token = iterator, wait, token

    def __iter__(self) -> _TracedIterator[T]:
        return self

    def __next__(self) -> T:
        previous = self._wait.begin(self._token)
        if previous < 0:
            return next(self._iterator)

        got = False
        try:
            item = next(self._iterator)
            got = True
            return item
        finally:
            self._wait.end(previous, self._token, got)
