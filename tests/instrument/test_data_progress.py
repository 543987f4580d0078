"""Batches that the training loader has given, and whether it has any left."""

from __future__ import annotations

import pytest
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tests.instrument.conftest import Traced
from tests.instrument.test_step_clock import data, evaluate, net, sgd, train
from traceml.instrument.loader import DataProgress


def progress(traced: Traced) -> DataProgress:
    return traced.instrumentation.clock.training_loader.data()


def test_batches_of_all_epochs_are_counted(traced: Traced) -> None:
    """Those of an evaluation are not; between two epochs none is left."""
    model = net()
    optimizer, loader = sgd(model), data(5)
    for epoch in (1, 2):
        for number, (x,) in enumerate(loader, 1):
            train(model, optimizer, x)
            assert progress(traced) == (5 * (epoch - 1) + number, epoch, False)

        assert progress(traced) == (5 * epoch, epoch, True)
        evaluate(model)
        assert progress(traced) == (5 * epoch, epoch, True)


@pytest.mark.process
def test_workers_that_stay_are_counted_by_epoch(traced: Traced) -> None:
    """Their iterator is one and the same object."""
    model = net()
    optimizer = sgd(model)
    loader = DataLoader(data(4).dataset, batch_size=2, num_workers=1, persistent_workers=True)
    for epoch in (1, 2):
        for (x,) in loader:
            train(model, optimizer, x)

        assert progress(traced) == (4 * epoch, epoch, True)


def test_an_iterator_that_was_left_is_not_counted(traced: Traced) -> None:
    """How many batches it gave is not known, so nothing is."""
    model = net()
    optimizer, loader = sgd(model), data(5)
    for _ in range(2):
        for (x,) in loader:
            train(model, optimizer, x)
            break

    assert progress(traced) == (-1, 2, False)


class _Faulty(TensorDataset):
    """Rows of which one cannot be read."""

    def __getitem__(self, index: int) -> object:
        if index == 4:
            raise ValueError("row 4")

        return super().__getitem__(index)


def test_a_batch_that_fails_is_not_the_end(traced: Traced) -> None:
    """The script catches the exception and takes the next batch."""
    model = net()
    optimizer = sgd(model)
    batches = iter(DataLoader(_Faulty(*data(5).dataset.tensors), batch_size=2))
    train(model, optimizer, next(batches)[0])
    train(model, optimizer, next(batches)[0])
    with pytest.raises(ValueError, match="row 4"):
        next(batches)

    train(model, optimizer, next(batches)[0])
    assert progress(traced) == (3, 1, False)


@pytest.mark.parametrize(("shuffles", "sets", "reported"), [(True, False, 1), (True, True, 0), (False, False, 0)])
def test_a_distributed_sampler_without_set_epoch_is_reported_once(
    traced: Traced, *, shuffles: bool, sets: bool, reported: int
) -> None:
    """Each epoch then has the order of the first one; without shuffling that is meant."""
    model = net()
    optimizer, rows = sgd(model), data(8).dataset
    sampler: DistributedSampler[object] = DistributedSampler(rows, num_replicas=2, rank=0, shuffle=shuffles)
    loader = DataLoader(rows, batch_size=2, sampler=sampler)
    for epoch in range(5):
        if sets:
            sampler.set_epoch(epoch)

        for (x,) in loader:
            train(model, optimizer, x)

    traced.finish()
    assert [row["number"] for row in traced.info if row["kind"] == "same_order"] == [0] * reported


def test_an_order_that_was_only_begun_does_not_count(traced: Traced) -> None:
    """A batch that is looked at, and a run that is cut short, before `set_epoch` is called."""
    model = net()
    optimizer, rows = sgd(model), data(8).dataset
    loader = DataLoader(rows, batch_size=2, sampler=DistributedSampler(rows, num_replicas=2, rank=0))
    for _ in range(4):
        for (x,) in loader:
            train(model, optimizer, x)
            break

    traced.finish()
    assert not [row for row in traced.info if row["kind"] == "same_order"]


@pytest.mark.parametrize("sets", [True, False])
def test_epochs_that_end_by_break_have_an_order_too(traced: Traced, *, sets: bool) -> None:
    """The same first batches in each epoch are the same order."""
    model = net()
    optimizer, rows = sgd(model), data(12).dataset
    sampler: DistributedSampler[object] = DistributedSampler(rows, num_replicas=2, rank=0)
    loader = DataLoader(rows, batch_size=2, sampler=sampler)
    for epoch in range(4):
        if sets:
            sampler.set_epoch(epoch)

        for number, (x,) in enumerate(loader, 1):
            train(model, optimizer, x)
            if number == 4:
                break

    traced.finish()
    assert len([row for row in traced.info if row["kind"] == "same_order"]) == (not sets)


def test_batches_that_are_looked_at_during_an_epoch_are_no_epochs(traced: Traced) -> None:
    """The steps between two looks are of the epoch's own iterator."""
    model = net()
    optimizer, rows = sgd(model), data(24).dataset
    sampler: DistributedSampler[object] = DistributedSampler(rows, num_replicas=2, rank=0)
    loader = DataLoader(rows, batch_size=2, sampler=sampler)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for number, (x,) in enumerate(loader):
            train(model, optimizer, x)
            if number % 3 == 0:
                next(iter(loader))

    traced.finish()
    assert not [row for row in traced.info if row["kind"] == "same_order"]


@pytest.mark.process
def test_workers_that_stay_begin_an_order_in_each_epoch_that_ends_by_break(traced: Traced) -> None:
    """Their iterator is not gone when the loop has left it."""
    model = net()
    optimizer, rows = sgd(model), data(12).dataset
    sampler: DistributedSampler[object] = DistributedSampler(rows, num_replicas=2, rank=0)
    loader = DataLoader(rows, batch_size=2, sampler=sampler, num_workers=1, persistent_workers=True)
    for _ in range(4):
        for number, (x,) in enumerate(loader, 1):
            train(model, optimizer, x)
            if number == 4:
                break

    traced.finish()
    assert len([row for row in traced.info if row["kind"] == "same_order"]) == 1
