"""Timing of waits for batches: torch's DataLoader, and iterables given to `trace_data`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from copy import copy
from functools import cache, cached_property
from sys import getrefcount
from typing import Any, Generic, NamedTuple, TypeVar, cast

from traceml.clock import monotonic_ns
from traceml.database.schema import Phase, Slot
from traceml.instrument.facts.instance_attributes import instance_attribute
from traceml.instrument.importlib_bootstrap import uncounted
from traceml.instrument.patches import Patches
from traceml.instrument.phase_timer import OTHER, Began, on_training_thread
from traceml.instrument.step_clock import StepClock
from traceml.instrument.workers.loader_workers import follow_iterator

__all__ = ["DataProgress", "LoaderToken", "TracedIterable", "patch_loaders"]

T = TypeVar("T")
_TAG = "_traceml_loader"
_REPEATED = 2
_LEFT_EPOCH_STEPS = 2  # fewer before a `break` may be a look at a batch
_INPUT_WAIT, _ITERATING = int(Phase.INPUT_WAIT), int(Slot.ITERATING)


class DataProgress(NamedTuple):
    """Progress through the data of a loader."""

    batches: int = -1  # that it has given, in all epochs; -1 if not known
    epoch: int = 0  # number of its newest iterator, from 1; 0 before the first
    is_over: bool = False  # whether that one has no batch left


class LoaderToken:
    """Token for a loader in the clock, which must not keep the loader alive.

    Attributes:
        number: of the loader in this process, in the order of their first use; that of an earlier one like it.
        is_left: its last iterator is gone, as after `next(iter(loader))`: a step closes without another request.
    """

    is_left = is_read = False
    _iterator: Any = None
    _is_kept = False  # by the loader: with `persistent_workers`, or by one of torchdata
    _before: int | None = 0  # batches of the iterators before the newest one; None if one was left early
    _epoch = 0
    _last = -1  # batches of the newest iterator at its end; -1 before it
    _drawn: Any = None  # epoch by which the sampler has drawn the newest order
    _same = 0  # epochs before it in that order
    _drawn_step = 0
    _overlaps = False  # whether iterators were read side by side: then steps are not known to be of one of them

    def __init__(self, number: int = 0) -> None:
        self.number = number

    def follow(self, loader: Any, iterator: Any, clock: StepClock) -> None:
        """Notice when an iterator of the loader is gone, and inform the clock."""

        def leave(gone: Any) -> None:
            if gone is not self._iterator:
                return

            try:
                self.is_left = True
                self.read(clock, False)
                clock.loader_left(self)
            except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
                clock.fail(error)

        self.is_left = False
        self._is_kept = instance_attribute(loader, "_iterator") is iterator
        self._count_next_iterator()
        with suppress(TypeError):  # its class allows no weak references: it counts as alive
            self._iterator = weakref.ref(iterator, leave)
            self.read(clock, True)
            follow_iterator(iterator, self.number)

    def repeats_order(self, loader: Any, step: int) -> bool:
        """Return whether a new iterator is the third in a row whose sampler draws the same order: no `set_epoch`.

        Only iterators that were read to their end, or left after some steps, count: others may have looked at a batch.
        """
        drawn = _sampler_epoch(loader)
        is_epoch = self._was_left_after_steps(step) or self._last >= 0
        self._same = self._same + 1 if drawn is not None and drawn == self._drawn and is_epoch else 0
        self._drawn, self._drawn_step = drawn, step
        return self._same == _REPEATED

    def _was_left_after_steps(self, step: int) -> bool:
        open_iterator = self._iterator() if self._iterator is not None else None
        self._overlaps = self._overlaps or not (open_iterator is None or self._is_kept or self._last >= 0)
        return not self._overlaps and step - self._drawn_step >= _LEFT_EPOCH_STEPS

    def end(self, clock: StepClock) -> None:
        """Record that its iterator has no batch left."""
        self.read(clock, False)
        given = self._given()
        self._last = -1 if given is None else given

    def note_left(self, clock: StepClock) -> None:
        """Record that its iterator was left, where only the loader keeps it."""
        iterator, alike = self._iterator() if self._iterator is not None else None, object()
        if self._is_kept and getrefcount(iterator) <= getrefcount(alike) + 1:
            self.read(clock, False)

    def data(self) -> DataProgress:
        """Return how far its data is read, on any thread."""
        given = self._given()
        is_over = self._last >= 0 and given in (None, self._last)
        given = self._last if is_over else given
        batches = -1 if given is None or self._before is None else self._before + given
        return DataProgress(batches, self._epoch, is_over)

    def _given(self) -> int | None:
        """Return the batches of the newest iterator, by torch's own count; None if it is gone."""
        return getattr(self._iterator() if self._iterator is not None else None, "_num_yielded", None)

    def _count_next_iterator(self) -> None:
        """Add the batches of an iterator that was read to its end; those of others are not known."""
        if self._iterator is not None:
            self._before = self._before + self._last if self._before is not None and self._last >= 0 else None

        self._epoch += 1
        self._last = -1

    def read(self, clock: StepClock, is_read: bool) -> None:
        """Record whether a loop reads the loader, or has read it to its end or left it."""
        if is_read is not self.is_read and clock.is_training_thread():
            self.is_read = is_read
            clock.open_slots[_ITERATING] += 1 if is_read else -1


def _sampler_epoch(loader: Any) -> Any:
    """Return the epoch of a DistributedSampler that shuffles by it; None of other samplers."""
    sampler = instance_attribute(loader, "sampler")
    shuffles = instance_attribute(sampler, "shuffle") is True
    is_by_epoch = shuffles and any(cls.__name__ == "DistributedSampler" for cls in type(sampler).__mro__)
    return instance_attribute(sampler, "epoch") if is_by_epoch else None


Begin = Callable[[Any], Began | None]
End = Callable[[Began, Any, bool | None], None]


def timed_wait(clock: StepClock) -> tuple[Begin, End]:
    """Return functions that begin and end a wait for a batch.

    The first takes the loader's token. It returns a value for the second, or None when the wait does not count here.
    The second takes that value, the token, and the result: a batch (True), no batch left (False), or only the iterator
    was created (None).
    """

    def begin(loader: Any) -> Began | None:
        previous = clock.current
        if previous < OTHER or not (on_training_thread() or clock.is_training_thread()):
            return nested()

        try:
            t = monotonic_ns()
            if loader is clock.closing_trigger:
                clock.commit(t)
            else:
                clock.boundary(t, loader)

            clock.current = _INPUT_WAIT
            clock.open_slots[_INPUT_WAIT] = t
            return previous, t
        except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
            clock.fail(error)
            return None

    def nested() -> Began | None:
        """Begin a wait inside another phase, which does not end a step."""
        return clock.enter(_INPUT_WAIT) if clock.is_training_thread() else None

    def end(began: Began, loader: Any, got: bool | None) -> None:
        try:
            previous, start = began
            spent = monotonic_ns() - start
            clock.input_ns += spent
            clock.current = previous
            clock.open_slots[_INPUT_WAIT] = 0
            if previous != OTHER:
                clock.add(previous, -spent)

            if got:
                note_batch(loader)
            elif got is False:
                clock.exhausted(loader, spent)
            else:
                clock.new_iterator(spent)
        except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
            clock.fail(error)

    def note_batch(loader: Any) -> None:
        clock.batches += 1
        if clock.batch is None:
            clock.batch = loader
            if clock.first_loader is None:
                clock.first_loader = loader

    return begin, end


def patch_loaders(
    patches: Patches,
    clock: StepClock,
    on_loader: Callable[[Any, LoaderToken], None],
    on_iterator: Callable[[], None],
    on_batch: Callable[[Any], None],
    on_same_order: Callable[[int], None] = lambda _number: None,
) -> Callable[[Any, Any], None]:
    """Time DataLoader's iterators.

    Args:
        on_loader: called with each loader and its token when its first iterator is created; may change its number.
        on_iterator: called outside all phases after an iterator was created: a new model may run on its batches.
        on_batch: called with each batch while the clock `inspects` them.
        on_same_order: called with the number of a loader whose DistributedSampler draws one order again and again.

    Returns:
        A function that does the same for a subclass of DataLoader with an `__iter__` of its own, and its iterator's
        class, which has `_shutdown_workers`.
    """
    from torch.utils.data import dataloader

    iterator_type: Any = dataloader._BaseDataLoaderIter
    original_next = iterator_type.__next__
    wait = timed_wait(clock)
    in_python = _timed_next(clock, wait, original_next, on_batch)
    timed_next = in_python
    if clock.hook is not None:
        timed_next = clock.hook(clock, _INPUT_WAIT, original_next, in_python, on_batch)

    patches.replace(iterator_type, _TAG, LoaderToken())
    patches.wrap(iterator_type, "__next__", timed_next)
    tokens = _LoaderTokens(on_loader, on_same_order, lambda: clock.step)
    for name, follows in (("__init__", False), ("_reset", True)):  # workers are started between the two
        patches.wrap(iterator_type, name, _noting(clock, getattr(iterator_type, name), tokens, follows=follows))

    @uncounted
    def patch_type(loader_type: Any, with_workers: Any) -> None:
        patches.wrap(loader_type, "__iter__", _timed_iter(clock, wait, loader_type.__iter__, tokens, on_iterator))
        patches.wrap(with_workers, "_shutdown_workers", _timed_shutdown(clock, with_workers._shutdown_workers))

    patch_type(dataloader.DataLoader, dataloader._MultiProcessingDataLoaderIter)
    return patch_type


@uncounted
def _timed_next(clock: StepClock, wait: tuple[Begin, End], original: Any, on_batch: Callable[[Any], None]) -> Any:
    begin, end = wait

    def __next__(self: Any) -> Any:  # noqa: N807 - name of the replaced method
        loader = getattr(self, _TAG, None)  # not there where another tool still calls this after `uninstall`
        began = None if loader is None else begin(loader)
        if began is None:
            return original(self)

        got = False
        try:
            batch = original(self)
            got = True
        finally:
            end(began, loader, got)

        if clock.inspects:
            try:
                on_batch(batch)
            except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
                clock.fail(error)

        return batch

    return __next__


@uncounted
def _timed_iter(
    clock: StepClock, wait: tuple[Begin, End], original: Any, tokens: _LoaderTokens, on_iterator: Callable[[], None]
) -> Any:
    begin, end = wait

    def __iter__(self: Any) -> Any:  # noqa: N807 - name of the replaced method
        loader = token_of(self)
        if loader is None:
            return original(self)

        began = begin(loader)
        try:
            iterator = original(self)
        finally:
            if began is not None:
                end(began, loader, None)

        on_iterator()
        with suppress(Exception):  # the iterator of a subclass may allow no such attribute: it has the common token
            setattr(iterator, _TAG, loader)

        follow(loader, self, iterator)

        return iterator

    def follow(token: LoaderToken, loader: Any, iterator: Any) -> None:
        try:
            token.follow(loader, iterator, clock)
        except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
            clock.fail(error)

    def token_of(loader: Any) -> LoaderToken | None:
        try:
            trains = clock.is_training_thread() and clock.current != _INPUT_WAIT
            return tokens.of(loader) if trains else None
        except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
            clock.fail(error)
            return None

    return __iter__


@uncounted
def _timed_shutdown(clock: StepClock, original: Any) -> Any:
    """Return a method that ends the workers of an iterator; the end of one that is dropped is input, too."""

    def _shutdown_workers(self: Any) -> Any:
        began = clock.workers_end(getattr(self, _TAG, None)) if clock.current >= OTHER else None
        if began is None:
            return original(self)

        try:
            return original(self)
        finally:
            clock.leave(_INPUT_WAIT, began)
            clock.workers_ended(began)

    return _shutdown_workers


@uncounted
def _noting(clock: StepClock, original: Any, tokens: _LoaderTokens, *, follows: bool) -> Any:
    """Return a method of iterators that reports loaders with an `__iter__` of their own, as those of fastai.

    Args:
        original: their `__init__` or `_reset`, which are given the loader.
        follows: whether the iterator has its workers by then.
    """

    def method(self: Any, loader: Any, *args: Any, **kwargs: Any) -> None:
        try:
            if clock.current != _INPUT_WAIT and clock.is_training_thread():  # else a timed `__iter__` makes it
                token = tokens.of(loader)
                if follows:
                    follow_iterator(self, token.number)
        except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
            clock.fail(error)

        original(self, loader, *args, **kwargs)

    return method


class _LoaderTokens:
    """One token per loader, for the lifetime of the loader."""

    def __init__(
        self,
        on_loader: Callable[[Any, LoaderToken], None],
        on_same_order: Callable[[int], None],
        step: Callable[[], int],
    ) -> None:
        self._on_loader, self._on_same_order, self._step = on_loader, on_same_order, step
        self._seen = 0
        self._tokens: weakref.WeakKeyDictionary[Any, LoaderToken] = weakref.WeakKeyDictionary()

    def of(self, loader: Any) -> LoaderToken:
        """Return the loader's token; report the loader the first time."""
        try:
            token = self._tokens.get(loader)
        except Exception:  # noqa: BLE001 - the hash of a subclass raises: each iterator counts as another loader
            return LoaderToken()

        if token is None:
            token = self._tokens[loader] = LoaderToken(self._seen)
            self._seen += 1
            self._on_loader(loader, token)

        if token.repeats_order(loader, self._step()):
            self._on_same_order(token.number)

        return token


class TracedIterable(Generic[T]):
    """Iterable with timed waits for its items. Like a DataLoader, it separates steps."""

    _iterable: Iterable[T]
    _token: LoaderToken
    _begin: Begin
    _end: End

    def __init__(self, iterable: Iterable[T], clock: StepClock) -> None:
        begin, end = timed_wait(clock)
        vars(self).update(_iterable=iterable, _token=LoaderToken(), _begin=begin, _end=end)

    @staticmethod
    def of(iterable: Iterable[Any], clock: StepClock) -> TracedIterable[Any]:
        """Return the iterable with the special methods that its type has: these are not looked up by `__getattr__`."""
        return _traced_class(*(name for name in _SPECIAL_METHODS if hasattr(type(iterable), name)))(iterable, clock)

    @uncounted
    def __iter__(self) -> Iterator[T]:
        """Return a timed iterator."""
        began = self._begin(self._token)
        try:
            iterator = iter(self._iterable)
        finally:
            if began is not None:
                self._end(began, self._token, None)

        return self if iterator is self._iterable else self._timed(iterator)

    def _timed(self, iterator: Iterator[T]) -> _TracedIterator[T]:
        return _TracedIterator(iterator, self._begin, self._end, self._token)

    @cached_property
    def _next(self) -> Callable[[], T]:
        return self._timed(cast("Iterator[T]", self._iterable)).__next__

    def __reduce__(self) -> Any:
        # Copies, also those in other processes, are of the iterable: a clock cannot be copied.
        return copy, (self._iterable,)

    def __getattr__(self, name: str) -> Any:
        # Scripts use attributes of loaders: `dataset`, `sampler.set_epoch(...)`.
        return getattr(self._iterable, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._iterable, name, value)


_SPECIAL_METHODS: dict[str, Callable[..., Any]] = {
    "__next__": uncounted(lambda self: self._next()),
    "__len__": lambda self: len(self._iterable),
    "__bool__": lambda self: bool(self._iterable),
    "__contains__": lambda self, item: item in self._iterable,
    "__getitem__": lambda self, index: self._iterable[index],
    "__enter__": lambda self: self if (entered := self._iterable.__enter__()) is self._iterable else entered,
    "__exit__": lambda self, *error: self._iterable.__exit__(*error),
}


@cache
def _traced_class(*names: str) -> type[TracedIterable[Any]]:
    """Return the class with some of the special methods; there are few, however often a script calls `trace_data`."""
    return type(TracedIterable.__name__, (TracedIterable,), {name: _SPECIAL_METHODS[name] for name in names})


class _TracedIterator(Generic[T]):
    """One pass over a traced iterable."""

    __slots__ = ("_begin", "_end", "_iterator", "_token")

    def __init__(self, iterator: Iterator[T], begin: Begin, end: End, token: LoaderToken) -> None:
        self._iterator, self._begin, self._end, self._token = iterator, begin, end, token

    def __iter__(self) -> _TracedIterator[T]:
        return self

    @uncounted
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
