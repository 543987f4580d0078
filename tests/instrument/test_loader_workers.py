"""Worker processes of real loaders, and the objects that their data sets hold."""

from __future__ import annotations

import gc
import multiprocessing

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from tests.forked import client as forked
from traceml.instrument.facts.descriptions import held_objects, loader_facts
from traceml.instrument.workers.loader_workers import follow_iterator, worker_pids


class Listing(Dataset):
    """A data set with a list of names."""

    def __init__(self, count: int = 20_000) -> None:
        self.files = [str(number) for number in range(count)]
        self.few = [1, 2, 3]
        self.tensor = torch.zeros(count)

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.zeros(4) + len(self.files[index])


@pytest.mark.process
def test_workers_are_known_while_their_iterator_is_alive() -> None:
    """The second loader has the next number; an iterator that is gone is forgotten."""
    iterators = [iter(DataLoader(Listing(), num_workers=2)) for _ in range(2)]
    for number, iterator in enumerate(iterators):
        follow_iterator(iterator, number)

    children = {child.pid for child in multiprocessing.active_children()}
    assert [group.loader for group in worker_pids()] == [0, 1]
    assert {pid for group in worker_pids() for pid in group.pids} <= children

    del iterator
    iterators.clear()
    gc.collect()
    assert worker_pids() == ()


@pytest.mark.process
def test_an_iterator_without_workers_has_no_group() -> None:
    """And the same iterator is one group, as with persistent workers."""
    follow_iterator(iter(DataLoader(Listing())))
    assert worker_pids() == ()

    iterator = iter(DataLoader(Listing(), num_workers=1, persistent_workers=True))
    follow_iterator(iterator)
    follow_iterator(iterator)
    assert len(worker_pids()) == 1


@pytest.mark.parametrize("wrap", [lambda it: it, lambda it: Subset(it, [1, 2]), lambda it: ConcatDataset([it, it])])
def test_containers_of_many_objects_are_described(wrap) -> None:
    """Also inside wrappers; short lists and tensors are not named."""
    found = held_objects(wrap(Listing()))

    assert found[0] == {"path": "Listing.files", "type": "list", "count": 20_000, "of": "str"}
    assert {each["path"] for each in found} == {"Listing.files"}
    assert held_objects(Listing(100)) == []
    assert held_objects(None) == []


class Samples(Dataset):
    """A data set with tensors, which it reads for each sample."""

    def __init__(self) -> None:
        self.inputs, self.few = torch.zeros(8, 4), [1, 2, 3]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.inputs[index]


@pytest.mark.parametrize("wrap", [lambda it: it, lambda it: Subset(it, [1, 2]), lambda it: ConcatDataset([it, it])])
def test_a_data_set_keeps_its_fast_attributes(wrap) -> None:
    """Nothing reads its `__dict__`: Python would make one, and find attributes more slowly from then on."""
    samples = Samples()
    loader = DataLoader(wrap(samples), batch_size=2)
    facts = loader_facts(loader)

    assert facts["in_memory"] is (True if loader.dataset is samples or isinstance(loader.dataset, Subset) else None)
    for part in (samples, loader.dataset):
        assert not any(type(each) is dict for each in gc.get_referents(part))


@pytest.mark.process
def test_the_start_method_is_reported_without_setting_it() -> None:
    """Asking for it must not keep the script from choosing one."""
    code = (
        "import multiprocessing as mp, torch\n"
        "from torch.utils.data import DataLoader\n"
        "from traceml.instrument.facts.descriptions import loader_facts\n"
        "loader = DataLoader(torch.zeros(8, 2), num_workers=1)\n"
        "first = loader_facts(loader)['start_method']\n"
        "mp.set_start_method('spawn')\n"
        "print(first, loader_facts(loader)['start_method'])\n"
    )
    printed = forked.run_code(code, check=True, text=True)

    assert printed.stdout.split() == [multiprocessing.get_all_start_methods()[0], "spawn"]
    assert loader_facts(DataLoader(Listing(), num_workers=1, multiprocessing_context="forkserver"))["start_method"] == (
        "forkserver"
    )
    assert loader_facts(DataLoader(Listing()))["start_method"] is None
