"""Descriptions of models, as the rules read them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter, _SingleProcessDataLoaderIter

from tests.instrument.conftest import Traced
from tests.instrument.test_step_clock import data, net, sgd, train
from traceml.diagnosis.facts.job_facts_builder import JobFactsBuilder
from traceml.instrument.facts.descriptions import loader_facts, model_facts
from traceml.instrument.workers.loader_workers import worker_pids


def test_the_threads_of_torch_reach_the_rules():
    """Advice on OMP_NUM_THREADS compares them with the cores."""
    before = torch.get_num_threads()
    builder = JobFactsBuilder()
    try:
        torch.set_num_threads(3)
        builder.info(0, {"kind": "model", **model_facts(nn.Linear(2, 2))})
    finally:
        torch.set_num_threads(before)

    assert builder.build().threads == 3


class Tied(nn.Module):
    """A language model whose output layer has the weights of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, 4), nn.Linear(4, 50, bias=False)
        self.head.weight = self.table.weight


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 2)), 200),
        (nn.Sequential(nn.EmbeddingBag(50, 4, sparse=True), nn.Linear(4, 2)), 0),
        (nn.Embedding.from_pretrained(torch.rand(50, 4)), 0),  # is not trained
        (Tied(), 0),
        (nn.Linear(4, 2), 0),
    ],
)
def test_tables_whose_gradients_have_all_rows_are_counted(model: nn.Module, expected: int) -> None:
    """Not those that have sparse gradients already, or need gradients of all rows."""
    assert model_facts(model)["dense_embeddings"] == expected


@pytest.fixture
def four_ranks() -> Iterator[Any]:
    """A mesh of four ranks, two by two, seen by rank 1; no other rank exists, nothing is sent."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    yield init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    dist.destroy_process_group()


def test_ranks_of_a_sharded_model_are_known(four_ranks: Any) -> None:
    """`fully_shard` averages gradients over its mesh only: tensor-parallel ranks are not in it, all of a hybrid are."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    split, hybrid = nn.Linear(8, 8), nn.Linear(8, 8)
    parallelize_module(split, four_ranks["inner"], ColwiseParallel())
    fully_shard(split, mesh=four_ranks["outer"])
    fully_shard(hybrid, mesh=four_ranks)

    assert model_facts(split).items() >= {"gradient_size": 2, "gradient_ranks": [1, 3]}.items()
    assert model_facts(hybrid).items() >= {"gradient_size": 4, "gradient_ranks": None}.items()
    assert "gradient_size" not in model_facts(nn.Linear(8, 8))


@pytest.mark.parametrize(("options", "reshards"), [({}, True), ({"reshard_after_forward": False}, False)])
def test_a_sharded_model_that_keeps_its_parameters_is_known(
    four_ranks: Any, options: dict[str, bool], reshards: bool
) -> None:
    """The outermost module keeps them unless it is told not to."""
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for each in (*model, model):
        fully_shard(each, mesh=four_ranks, **options)

    alone = fully_shard(nn.Linear(8, 8), mesh=four_ranks, **options)

    assert model_facts(model)["reshards"] is reshards
    assert model_facts(alone)["reshards"] is False
    assert model_facts(nn.Linear(8, 8))["reshards"] is None


def test_the_hook_that_exchanges_gradients_is_known(four_ranks: Any) -> None:
    """A script gives it to DDP, as to compress them."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    model = nn.parallel.DistributedDataParallel(nn.Linear(8, 8))
    assert model_facts(model)["comm_hook"] is None

    model.register_comm_hook(None, fp16_compress_hook)
    assert model_facts(model)["comm_hook"] == "fp16_compress_hook"


def test_a_lazy_model_is_described_by_the_parameters_that_it_has() -> None:
    """The others have no size before the first call."""
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    assert model_facts(model).items() >= {"parameters": 10, "trainable": 10, "dtype": "torch.float32"}.items()


def test_the_cores_that_the_training_thread_may_use_are_known_where_they_are_fewer() -> None:
    """As after OMP_PROC_BIND, which binds the main thread of each process to the first core."""
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        bound = model_facts(nn.Linear(2, 2))["bound_cores"]
    finally:
        os.sched_setaffinity(0, allowed)

    one_of_one = os.cpu_count() == 1
    assert bound == (None if one_of_one else [min(allowed)])
    assert model_facts(nn.Linear(2, 2))["bound_cores"] == (None if len(allowed) == os.cpu_count() else sorted(allowed))


def test_detection_of_anomalies_is_reported_while_it_is_on(traced: Traced) -> None:
    """It is told at the first backward pass, and when it has ended."""
    model = net()
    optimizer = sgd(model)
    with torch.autograd.set_detect_anomaly(True):
        for (x,) in data(3):
            train(model, optimizer, x)

    rows = [row["on"] for row in traced.info if row["kind"] == "anomaly_detection"]
    for (x,) in data(130):
        train(model, optimizer, x)

    assert rows == [True]
    assert [row["on"] for row in traced.info if row["kind"] == "anomaly_detection"] == [True, False]


@pytest.mark.parametrize(
    ("begin", "on"),
    [
        (torch.autograd.detect_anomaly, [True]),
        (lambda: torch.autograd.set_detect_anomaly(True), [True]),
        (lambda: torch.autograd.set_detect_anomaly(False), []),
    ],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_detection_in_a_part_of_each_step_is_reported(traced: Traced, begin: Callable[[], Any], on: list[bool]) -> None:
    """It is off whenever a step ends, as in `with detect_anomaly(): loss.backward()`."""
    model = net()
    optimizer = sgd(model)
    for (x,) in data(130):
        with begin():
            loss = model(x).sum()
            loss.backward()

        optimizer.step()

    assert [row["on"] for row in traced.info if row["kind"] == "anomaly_detection"] == on


def test_compiling_is_no_detection_of_anomalies(traced: Traced) -> None:
    """Torch turns it on while it traces a backward pass."""
    model = net()
    optimizer = sgd(model)
    compiled = torch.compile(model, backend="aot_eager")
    for (x,) in data(3):
        train(compiled, optimizer, x)

    assert not [row for row in traced.info if row["kind"] == "anomaly_detection"]


def test_a_profiler_is_reported_while_it_records(traced: Traced) -> None:
    """One that is left on is on at each look; it is told when it has ended."""
    model = net()
    optimizer = sgd(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        for (x,) in data(3):
            train(model, optimizer, x)

    for (x,) in data(130):
        train(model, optimizer, x)

    assert [row["on"] for row in traced.info if row["kind"] == "profiler"] == [True, False]


def test_usual_trainings_report_no_detection_of_anomalies(traced: Traced) -> None:
    """Nothing is told of what is off."""
    model = net()
    optimizer = sgd(model)
    for (x,) in data(70):
        train(model, optimizer, x)

    assert not {"anomaly_detection", "profiler"} & {row["kind"] for row in traced.info}


def test_models_and_optimizers_have_their_step(traced: Traced) -> None:
    """A second training in the same process has other sizes from its first step on."""
    for width, batches in ((8, 3), (16, 4)):
        model = torch.nn.Sequential(nn.Linear(4, width), nn.Linear(width, 1))
        optimizer = sgd(model)
        for (x,) in data(batches):
            train(model, optimizer, x)

    builder = JobFactsBuilder()
    for row in traced.info:
        builder.info(0, row)

    assert len(builder.build().other_models) == 1
    assert 2 <= builder.build().other_models[0] <= 3


@pytest.mark.parametrize(("is_new", "begins"), [(True, [6, 12]), (False, [])])
def test_trainings_of_equal_models_begin_anew(traced: Traced, is_new: bool, begins: list[int]) -> None:
    """Each fold trains its model; a new optimizer for each epoch trains the one that there is."""
    model = net()
    for _ in range(3):
        model = net() if is_new else model
        optimizer = sgd(model)
        for (x,) in data(6):
            train(model, optimizer, x)

    assert [row["step"] for row in traced.info if row["kind"] == "training_begins"] == begins


def test_loaders_that_each_epoch_makes_are_counted(traced: Traced) -> None:
    """One loader for all epochs is none of them; of many only some counts are reported."""
    model = net()
    optimizer = sgd(model)
    kept = data(3)
    for _ in range(20):
        for (x,) in kept:
            train(model, optimizer, x)

    before = [row for row in traced.info if row["kind"] == "loaders_made"]
    for _ in range(20):
        for (x,) in data(2):
            train(model, optimizer, x)

    assert not before
    made = [row["made"] for row in traced.info if row["kind"] == "loaders_made"]
    assert made == [2, 3, 4, 5, 6, 7, 8, 16]


def test_loaders_that_are_alike_have_one_number(traced: Traced) -> None:
    """Each epoch makes one to train and one to evaluate; facts and sums of their workers do not grow with epochs."""
    model = net()
    optimizer = sgd(model)
    for _ in range(5):
        for (x,) in data(4):
            train(model, optimizer, x)

        with torch.no_grad():
            for (x,) in data(3):
                model(x)

    assert [row["number"] for row in traced.info if row["kind"] == "loader"] == [0, 1]
    assert [row["number"] for row in traced.info if row["kind"] == "training_loader"] == [0]


def test_a_loader_that_is_kept_beside_another_is_not_made_for_an_epoch(traced: Traced) -> None:
    """Two loaders of the same data, as to train and to fill a memory bank."""
    model = net()
    optimizer = sgd(model)
    kept = [data(3), data(3)]
    for _ in range(4):
        for loader in kept:
            for (x,) in loader:
                train(model, optimizer, x)

    assert not [row for row in traced.info if row["kind"] == "loaders_made"]


TRAINER = """
class Trainer:
    def get_train_dataloader(self): ...
    def train(self):
        return step(self)

def step(trainer):
    return describe()
"""


class Describing(NamedTuple):
    """A trainer of a framework in which a loader begins.

    Attributes:
        framework: module of the class that makes the loader.
        expected: the framework whose arguments make it.
    """

    framework: str
    expected: str | None


@pytest.mark.parametrize(
    "case",
    [
        Describing("transformers.trainer", "transformers"),
        Describing("sentence_transformers.sentence_transformer.trainer", "transformers"),
        Describing("trl.trainer.sft_trainer", "transformers"),
        Describing("__main__", None),
    ],
)
def test_a_loader_that_a_trainer_makes_has_its_name(case: Describing) -> None:
    """A subclass in the script that makes the loader itself takes the arguments of DataLoader."""
    code: dict[str, Any] = {"__name__": "transformers.trainer", "describe": lambda: loader_facts(data(1))}
    exec(TRAINER, code)
    own = type("Own", (code["Trainer"],), {"get_train_dataloader": _method_of(case.framework)})

    assert own().train()["trainer"] == case.expected
    assert loader_facts(data(1))["trainer"] is None


class InnerLoader:
    """The loader that fastai gives to torch's iterator: its own data set, made for another one."""

    _IterableDataset_len_called = generator = worker_init_fn = multiprocessing_context = None
    _auto_collation = persistent_workers = pin_memory = drop_last = False
    timeout, prefetch_factor, pin_memory_device, in_order = 0, 2, "", True
    _dataset_kind = 1  # an iterable

    def __init__(self, d: Any, num_workers: int = 0) -> None:
        self.d, self.dataset, self.num_workers = d, self, num_workers
        self.collate_fn = self._get_shared_seed = lambda batch=None: batch
        self._index_sampler = range(10)

    def __iter__(self) -> Any:
        return iter(self.d.dataset)


InnerLoader.__module__ = "fastai.data.load"


def test_a_loader_of_fastai_is_described(traced: Traced) -> None:
    """It never calls iter() of torch's loader; advice needs the workers that it has, and the user's data set."""
    dataset = TensorDataset(torch.randn(6, 4))
    own = SimpleNamespace(dataset=dataset, bs=2)
    model = net()
    optimizer = sgd(model)
    for (x,) in _SingleProcessDataLoaderIter(InnerLoader(own)):
        train(model, optimizer, x)

    (row,) = [row for row in traced.info if row["kind"] == "loader"]
    assert (row["dataset"], row["length"], row["batch_size"]) == ("TensorDataset", 6, 2)
    assert (row["num_workers"], row["trainer"]) == (0, "fastai")
    assert len(traced.finish()) == 6


@pytest.mark.process
def test_the_workers_of_fastai_are_followed(traced: Traced) -> None:
    """Their CPU time, memory and deaths are told as those of torch's own loader."""
    own = SimpleNamespace(dataset=TensorDataset(torch.ones(6, 4)), bs=2)
    others = {child.pid for child in multiprocessing.active_children()}  # of earlier tests, which may end meanwhile
    iterator = _MultiProcessingDataLoaderIter(InnerLoader(own, num_workers=2))

    (group,) = worker_pids()
    assert group.loader == 0
    assert set(group.pids) == {child.pid for child in multiprocessing.active_children()} - others

    del iterator
    assert worker_pids() == ()


class OwnIteration(DataLoader[Any]):
    """A loader that makes torch's iterator itself, as torchdata's StatefulDataLoader does."""

    def __iter__(self) -> Any:
        return _SingleProcessDataLoaderIter(self)


def test_a_loader_with_its_own_iter_is_described_once(traced: Traced) -> None:
    """Advice needs the workers that it has; a loader of torch is described once too."""
    model = net()
    optimizer = sgd(model)
    for kind in (OwnIteration, DataLoader):
        loader = kind(TensorDataset(torch.randn(6, 4)), batch_size=2)
        for _ in range(2):
            for (x,) in loader:
                train(model, optimizer, x)

    described = [row["loader"] for row in traced.info if row["kind"] == "loader"]
    assert described == ["OwnIteration", "DataLoader"]
    assert len(traced.finish()) == 12


def _method_of(module: str) -> Any:
    def get_train_dataloader(_self: Any) -> None: ...

    get_train_dataloader.__module__ = module
    return get_train_dataloader
