"""Facts about the objects of the script."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ChainDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    get_worker_info,
    random_split,
)

from traceml.instrument.facts import descriptions
from traceml.instrument.facts.descriptions import batch_size_facts, input_facts, loader_facts, optimizer_facts


class OwnOptimizer:
    """One that is none of torch's."""

    def __init__(self, params):
        self.params = list(params)


@pytest.mark.parametrize(
    ("make", "options", "fused"),
    [
        (torch.optim.AdamW, {}, False),
        (torch.optim.AdamW, {"fused": True}, True),
        (torch.optim.LBFGS, {}, None),
        (torch.optim.RMSprop, {}, None),
        (OwnOptimizer, {}, None),
    ],
)
def test_whether_an_optimizer_is_fused(make, options, fused):
    """None is one that has no such form."""
    assert optimizer_facts(make(torch.nn.Linear(2, 2).parameters(), **options))["fused"] is fused


@pytest.mark.parametrize(
    ("make", "options", "history_bytes"),
    [
        (torch.optim.LBFGS, {"history_size": 7}, 7 * 2 * 6 * 4),
        (torch.optim.LBFGS, {}, 100 * 2 * 6 * 4),
        (torch.optim.Adam, {}, None),
        (OwnOptimizer, {}, None),
    ],
)
def test_the_history_of_an_optimizer_has_a_size(make, options, history_bytes):
    """L-BFGS keeps two tensors like all parameters together for each past update."""
    assert optimizer_facts(make(torch.nn.Linear(2, 2).parameters(), **options))["history_bytes"] == history_bytes


class ByLength(SequentialSampler):
    """A sampler of the script."""


class Buckets(BatchSampler):
    """One that makes batches."""


@pytest.mark.parametrize(
    ("options", "classes"),
    [
        ({}, []),
        ({"sampler": RandomSampler(range(8))}, []),
        ({"sampler": ByLength(range(8))}, ["ByLength"]),
        ({"batch_sampler": Buckets(ByLength(range(8)), 2, False)}, ["Buckets", "ByLength"]),
        ({"batch_sampler": [[0, 1], [2, 3]]}, []),
    ],
)
def test_samplers_that_are_none_of_torchs(options, classes):
    """Their functions run in the training process, which the lines name by class."""
    assert loader_facts(DataLoader(range(8), **options))["samplers"] == classes


class Lines(IterableDataset):
    def __iter__(self):
        return iter(range(8))


class Divided(Lines):
    def __iter__(self):
        worker = get_worker_info()
        return iter(range(8) if worker is None else range(worker.id, 8, worker.num_workers))


def part_of_worker(lines):
    worker = get_worker_info()
    return lines if worker is None else lines[worker.id :: worker.num_workers]


class DividedByFunction(Lines):
    def __iter__(self):
        return (line for line in part_of_worker(range(8)))


class DividedInGenerator(Lines):
    def __iter__(self):
        return (line for line in range(8) if line % (get_worker_info() or self).num_workers == 0)


class DividedByAlias(Lines):
    def __iter__(self):
        worker = asked()
        return iter(range(8) if worker is None else range(worker.id, 8, worker.num_workers))


asked = get_worker_info


class Sorted(Lines):
    def __iter__(self):
        return iter(in_order(range(8)))


def in_order(lines):
    return sorted(lines)


@pytest.mark.parametrize(
    ("dataset", "is_undivided"),
    [
        (Lines(), True),
        (Sorted(), True),
        (Divided(), False),
        (DividedByFunction(), False),
        (DividedInGenerator(), False),
        (DividedByAlias(), False),
        (ChainDataset([Divided()]), False),
    ],
)
def test_a_stream_that_each_worker_would_read_is_known(dataset, is_undivided):
    """A library's own data sets divide themselves, or hold others that do."""
    described = loader_facts(DataLoader(dataset))
    assert (described["is_iterable"], described["is_undivided"]) == (True, is_undivided)


def divide(worker):
    Lines.first = worker


@pytest.mark.parametrize(
    ("function", "is_undivided"),
    [
        (divide, False),
        (functools.partial(divide), False),
        (Lines().__init__, False),  # a method: what it does is not looked at
        (functools.partial(functools.wraps), True),
        (None, True),
    ],
)
def test_a_function_of_the_script_may_divide_a_stream_as_a_worker_begins(function, is_undivided):
    """One of a library, as Lightning's, sets seeds."""
    assert loader_facts(DataLoader(Lines(), worker_init_fn=function))["is_undivided"] is is_undivided


def test_data_by_index_is_no_stream():
    """The loader divides it."""
    described = loader_facts(DataLoader(range(8), drop_last=True))
    assert described["drop_last"] is True
    assert (described["is_iterable"], described["is_undivided"]) == (False, False)


def test_a_part_of_a_data_set_is_named_by_the_whole():
    """`Subset` is no name that the script's author knows; its length is that of the part."""
    part, _ = random_split(TensorDataset(torch.zeros(8, 2)), [6, 2])
    facts = loader_facts(DataLoader(part))

    assert (facts["dataset"], facts["length"], facts["in_memory"]) == ("TensorDataset", 6, True)


@pytest.mark.parametrize(
    ("model", "precision", "is_used"),
    [
        (torch.nn.Linear(2, 2), "highest", False),
        (torch.nn.Linear(2, 2), "high", True),
        (torch.nn.Conv1d(2, 2, 1), "highest", True),
        (None, "high", True),
    ],
)
def test_whether_values_of_32_bits_may_be_computed_in_tf32(model, precision, is_used):
    """Matrices are not by default; convolutions are."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        facts = input_facts(torch.zeros(2, 2), model, batch_size=2, is_listed=False)
    finally:
        torch.set_float32_matmul_precision(before)

    assert facts["tf32"] is is_used


def test_what_a_batch_consists_of():
    """Tensors and arrays in nested containers; other values cost next to nothing to hand over."""
    batch = {"image": torch.zeros(2, 3), "boxes": [torch.zeros(5), torch.zeros(1)], "mask": (np.zeros(3),), "name": "a"}

    assert batch_size_facts(batch) == {"tensors": 4, "bytes": (6 + 5 + 1) * 4 + 3 * 8}


class SeveralGroups:
    """State of a module whose parameters `fully_shard` has put into several groups, as torch 2.13 has it."""

    def __init__(self, *ranks: list[int]):
        self._fsdp_param_groups = [SimpleNamespace(mesh_info=SimpleNamespace(mesh=Mesh(each))) for each in ranks]

    @property
    def _fsdp_param_group(self):
        raise AssertionError("there are several")


class Mesh:
    """A device mesh."""

    def __init__(self, ranks: list[int]):
        self.mesh = torch.tensor(ranks)


def test_the_meshes_of_several_groups_of_parameters():
    """Each has its own."""
    assert descriptions._meshes(SeveralGroups([0, 1], [0, 1, 2])) == [[0, 1], [0, 1, 2]]
