"""Waiting for batches: torch's DataLoader, and any other iterable that the user hands over."""

from __future__ import annotations

import weakref
from _thread import get_ident
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from traceml.clock import monotonic_ns
from traceml.instrument.clock import NOWHERE, OTHER, StepClock
from traceml.instrument.patches import Patches

__all__ = ["LoaderToken", "TracedIterable", "patch_loaders"]

T = TypeVar("T")
_TAG = "_traceml_loader"


class LoaderToken:
    """Stands for one loader in the clock, which must keep none alive."""

    __slots__ = ()


Begin = Callable[[Any], int]
End = Callable[[int, Any, bool | None], None]


def timed_wait(clock: StepClock) -> tuple[Begin, End]:
    """Return what begins and what ends a wait for a batch, for loaders of torch and others.

    The first takes the loader's token, and returns the phase to go back to, or -1 when the wait does not count here. The
    second takes that phase, the token, and how the wait ended: a batch came, none is left (False), or only the iterator
    was made (None).
    """
    slots, add, fail, commit, boundary = clock.open_slots, clock.add, clock.fail, clock.commit, clock.boundary
    # Cells of the clock.
    thread = current = mark = input_ns = batches = 0
    closes_at: Any = NOWHERE
    batch: Any = None
    first_loader: Any = None

    def begin(loader: Any) -> int:
        nonlocal current, mark
        previous = current
        if not previous or thread != get_ident():
            return -1

        try:
            t = monotonic_ns()
            if previous != OTHER:
                add(previous, t - mark)

            mark = t
            if loader is closes_at:
                commit(t)
            else:
                boundary(t, loader)

            mark = t
            current = 0
            slots[0] = t
        except Exception as error:  # noqa: BLE001 - fail open: counted and said by the clock
            fail(error)

        return previous

    def end(previous: int, loader: Any, got: bool | None) -> None:
        nonlocal current, mark, input_ns, batches, batch, first_loader
        try:
            t = monotonic_ns()
            if current:
                add(current, t - mark)
            else:
                input_ns += t - mark

            mark = t
            current = previous
            slots[0] = 0
            if got:
                batches += 1
                if batch is None:
                    batch = loader
                    if first_loader is None:
                        first_loader = loader
            elif got is False:
                clock.exhausted()
        except Exception as error:  # noqa: BLE001 - fail open: counted and said by the clock
            fail(error)

    return clock.bind(begin), clock.bind(end)


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
    begin, end = timed_wait(clock)
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
        self._iterable = iterable
        self._token = LoaderToken()
        self._begin, self._end = timed_wait(clock)

    def __iter__(self) -> Iterator[T]:
        """Return a timed iterator."""
        previous = self._begin(self._token)
        try:
            iterator = iter(self._iterable)
        finally:
            if previous >= 0:
                self._end(previous, self._token, None)

        return _TracedIterator(iterator, self._begin, self._end, self._token)

    def __len__(self) -> int:
        """Return the iterable's length, if it has one."""
        return len(self._iterable)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        # A loader has attributes that scripts use: `dataset`, `sampler.set_epoch(...)`.
        return getattr(self._iterable, name)


class _TracedIterator(Generic[T]):
    """One pass over a traced iterable."""

    __slots__ = ("_begin", "_end", "_iterator", "_token")

    def __init__(self, iterator: Iterator[T], begin: Begin, end: End, token: LoaderToken) -> None:
        self._iterator, self._begin, self._end, self._token = iterator, begin, end, token

    def __iter__(self) -> _TracedIterator[T]:
        return self

    def __next__(self) -> T:
        previous = self._begin(self._token)
        if previous < 0:
            return next(self._iterator)

        got = False
        try:
            item = next(self._iterator)
            got = True
            return item
        finally:
            self._end(previous, self._token, got)
