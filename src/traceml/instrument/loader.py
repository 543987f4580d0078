"""Waiting for batches: torch's DataLoader, and any other iterable that the user hands over."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from traceml.clock import monotonic_ns
from traceml.database.schema import Phase
from traceml.instrument.accumulator import NOWHERE, OTHER, on_training_thread
from traceml.instrument.patches import Patches
from traceml.instrument.step_clock import StepClock

__all__ = ["LoaderToken", "TracedIterable", "patch_loaders"]

T = TypeVar("T")
_TAG = "_traceml_loader"
_INPUT_WAIT = int(Phase.INPUT_WAIT)


class LoaderToken:
    """Stands for one loader in the clock, which must keep none alive."""

    __slots__ = ()


Began = tuple[int, int]  # the phase to go back to, and when the wait began
Begin = Callable[[Any], Began | None]
End = Callable[[Began, Any, bool | None], None]


def timed_wait(clock: StepClock) -> tuple[Begin, End]:
    """Return what begins and what ends a wait for a batch, for loaders of torch and others.

    The first takes the loader's token, and returns what the second needs, or None when the wait does not count here.
    The second takes that, the token, and how the wait ended: a batch came, none is left (False), or only the iterator
    was made (None).
    """
    slots, fail, commit, boundary = clock.open_slots, clock.fail, clock.commit, clock.boundary
    # Cells of the clock.
    current = input_ns = batches = 0
    closes_at: Any = NOWHERE
    batch: Any = None
    first_loader: Any = None

    def begin(loader: Any) -> Began | None:
        nonlocal current
        previous = current
        if previous < OTHER or not on_training_thread():
            return nested()

        try:
            t = monotonic_ns()
            if loader is closes_at:
                commit(t)
            else:
                boundary(t, loader)

            current = _INPUT_WAIT
            slots[_INPUT_WAIT] = t
        except Exception as error:  # noqa: BLE001 - fail open: counted and said by the clock
            fail(error)

        return previous, t

    def nested() -> Began | None:
        """Batches fetched inside another phase bound no step."""
        if not clock.is_here():
            return None

        previous = clock.enter(_INPUT_WAIT)
        return None if previous < 0 else (previous, monotonic_ns())

    def end(began: Began, loader: Any, got: bool | None) -> None:
        nonlocal current, input_ns, batches, batch, first_loader
        previous, start = began
        spent = monotonic_ns() - start
        input_ns += spent
        current = previous
        slots[_INPUT_WAIT] = 0
        try:
            if previous != OTHER:
                clock.add(previous, -spent)

            if got:
                batches += 1
                if batch is None:
                    batch = loader
                    if first_loader is None:
                        first_loader = loader
            elif got is False:
                clock.exhausted(loader)
        except Exception as error:  # noqa: BLE001 - fail open: counted and said by the clock
            fail(error)

    return clock.bind(begin), clock.bind(end)


def patch_loaders(
    patches: Patches, clock: StepClock, on_loader: Callable[[Any], None], on_iterator: Callable[[], None]
) -> None:
    """Time DataLoader's iterators.

    Args:
        patches: where the originals are kept.
        clock: whose time it is.
        on_loader: called with each loader when its first iterator is made.
        on_iterator: called when an iterator was made, in no phase: a model that is new may be called on its batches.
    """
    from torch.utils.data import dataloader

    iterator_type: Any = dataloader._BaseDataLoaderIter
    original_next, original_iter = iterator_type.__next__, dataloader.DataLoader.__iter__
    begin, end = timed_wait(clock)
    tokens = _Tokens(on_loader)

    def __next__(self: Any) -> Any:  # noqa: N807 - the name that it stands in for
        loader = self._traceml_loader
        began = begin(loader)
        if began is None:
            return original_next(self)

        got = False
        try:
            batch = original_next(self)
            got = True
            return batch
        finally:
            end(began, loader, got)

    def __iter__(self: Any) -> Any:  # noqa: N807 - the name that it stands in for
        if not clock.is_here() or clock.current == _INPUT_WAIT:
            return original_iter(self)

        loader = tokens.of(self)
        began = begin(loader)
        try:
            iterator = original_iter(self)
        finally:
            if began is not None:
                end(began, loader, None)

        on_iterator()
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
        began = self._begin(self._token)
        try:
            iterator = iter(self._iterable)
        finally:
            if began is not None:
                self._end(began, self._token, None)

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
        began = self._begin(self._token)
        if began is None:
            return next(self._iterator)

        got = False
        try:
            item = next(self._iterator)
            got = True
            return item
        finally:
            self._end(began, self._token, got)
