"""Readings of the containers of a script whose memory grows."""

from __future__ import annotations

import gc
import sys
import threading
from collections import deque
from functools import cache, lru_cache, partial
from importlib.util import module_from_spec, spec_from_file_location
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from traceml.database.schema import OPEN_SLOTS, Slot
from traceml.recorder.growth import growing_lines
from traceml.recorder.growth.growing_lines import appending_line
from traceml.recorder.growth.growth_watch import GrowthWatch
from traceml.recorder.growth.reachable_objects import BUDGET_NS, ReachableObjects, read_containers

SECOND = 10**9


def is_here(frame: Any) -> bool:
    return frame.f_code.co_filename == __file__


class Tracker:
    """An object of the user's with containers."""

    def __init__(self) -> None:
        self.history: list[torch.Tensor] = []


class Photos:
    """A data set with a cache."""

    def __init__(self) -> None:
        self.cache: dict[int, torch.Tensor] = {}

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.cache.setdefault(index, torch.zeros(100))


@cache
def cached(number: int) -> list[int]:
    return [number]


def by_path(found: dict[Any, ReachableObjects]) -> dict[str, ReachableObjects]:
    return {held.path: held for held in found.values()}


def test_containers_of_variables_and_their_attributes_are_seen() -> None:
    """Lists, dicts, deques and caches, with what they hold; short ones are not."""
    weight = torch.ones(3, requires_grad=True)
    losses = [(weight * 2).sum() for _ in range(10)]
    metrics = {"loss": deque(range(20))}
    tracker, photos, short = Tracker(), Photos(), [1, 2]
    tracker.history += [torch.zeros(1000) for _ in range(9)]
    for number in range(12):
        photos[number], cached(number)

    found = by_path(read_containers(sys._getframe(), is_here))

    assert (found["losses"].size, found["losses"].holds_graph, found["losses"].item) == (10, True, "Tensor")
    assert (found["metrics['loss']"].size, found["metrics['loss']"].kind) == (20, "deque")
    assert found["tracker.history"].size == 9
    assert not found["tracker.history"].holds_graph
    assert 4000 <= found["tracker.history"].item_bytes < 5000
    assert found["photos.cache"].of_dataset
    assert not found["tracker.history"].of_dataset
    assert (found["cached"].kind, found["cached"].item) == ("lru_cache", "list")
    assert "short" not in found
    assert found["losses"].function == "test_containers_of_variables_and_their_attributes_are_seen"
    assert (len(losses), len(metrics), len(short)) == (10, 1, 2)


class Bounded:
    """Containers that hold so many elements at most."""

    def __init__(self) -> None:
        self.replay: deque[bytes] = deque(maxlen=100)

    @lru_cache(maxsize=50)  # noqa: B019 - keeps the object, as scripts do
    def decoded(self, number: int) -> bytes:
        return bytes(1000 + number)


def test_bounds_of_containers_are_seen() -> None:
    """Of a deque and of a cached method, whose newest result has the size of an element."""
    held = Bounded()
    for number in range(20):
        held.replay.append(held.decoded(number))

    found = by_path(read_containers(sys._getframe(), is_here))

    assert (found["held.replay"].size, found["held.replay"].max_size) == (20, 100)
    cache = found["held.decoded"]
    assert (cache.kind, cache.size, cache.max_size, cache.item) == ("lru_cache", 20, 50, "bytes")
    assert cache.item_bytes == sys.getsizeof(bytes(1019))
    assert found["cached"].max_size == 0


def test_a_global_belongs_to_the_module() -> None:
    """Not to the function that runs while it is seen."""
    cached(0)
    for number in range(9):
        cached(number)

    assert by_path(read_containers(sys._getframe(), is_here))["cached"].function == "<module>"


HELPERS = """
history = list(range(10))
class Registry:
    rows = list(range(11))
def record(row):
    history.append(row)
"""


@pytest.mark.parametrize(("folder", "paths"), [("lib", {"history", "Registry.rows"}), ("site-packages", set())])
def test_globals_of_the_user_s_other_modules_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, paths: set[str]
) -> None:
    """A function of theirs keeps what it is given, also while none of them runs; libraries are not searched."""
    file = tmp_path / folder / "kept_helpers.py"
    file.parent.mkdir()
    file.write_text(HELPERS)
    helpers = module_from_spec(spec_from_file_location("kept_helpers", file))
    helpers.__loader__.exec_module(helpers)
    monkeypatch.setitem(sys.modules, "kept_helpers", helpers)
    record = helpers.record
    del helpers

    found = by_path(read_containers(sys._getframe(), is_here))

    assert {path for path in ("history", "Registry.rows") if path in found} == paths
    assert all((found[path].file, found[path].function) == (str(file), "<module>") for path in paths)
    assert record.__module__ == "kept_helpers"


class Net(torch.nn.Module):
    """A model of the user's with a library's module inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))


def test_hooks_and_parameter_groups_are_seen_with_their_object() -> None:
    """Of a module inside a library's, of a parameter, and of an optimizer; a hook's size is what it has taken along."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(9):
        kept = torch.zeros(1000)
        model.layers[1].register_forward_hook(lambda *_, kept=kept: None)
        model.layers[0].weight.register_hook(lambda grad: grad)
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1000))]})

    found = by_path(read_containers(sys._getframe(), is_here))

    hooks = found["model.layers.1"]
    assert (hooks.kind, hooks.size, hooks.item) == ("hooks", 9, "function")
    assert 4000 <= hooks.item_bytes < 5000
    assert found["model.layers.0.weight"].size == 9
    assert (found["optimizer"].kind, found["optimizer"].size) == ("param_groups", 10)
    assert 4000 <= found["optimizer"].item_bytes < 6000
    assert "model" not in found
    assert "model.layers.0" not in found
    held = gc.get_referents(optimizer)  # its values: a `__dict__`, once made, slows each step
    assert not any(type(part) is dict and "param_groups" in part for part in held)


def test_a_parameter_group_has_the_size_of_all_that_is_kept_for_it() -> None:
    """Parameters, gradients, and the two states of Adam; the newest group may have no gradients yet."""
    first = torch.nn.Parameter(torch.zeros(1000))
    optimizer = torch.optim.Adam([first])
    for _ in range(9):
        added = torch.nn.Parameter(torch.zeros(1000))
        optimizer.add_param_group({"params": [added]})
        added.grad = torch.zeros(1000)

    optimizer.step()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1000))]})

    held = by_path(read_containers(sys._getframe(), is_here))["optimizer"]

    assert 4 * 4000 <= held.item_bytes < 5 * 4000


class Record:
    """An element with a tensor of its own, and an object that it shares."""

    def __init__(self, tracker: Tracker) -> None:
        self.output, self.tracker = torch.zeros(1000), tracker


def test_the_size_of_an_element_has_its_own_tensors() -> None:
    """Of an object, a function with what it has taken along, a partial, an array; not of objects that they refer to."""
    tracker = Tracker()
    tracker.shared = torch.zeros(100_000)  # type: ignore[attr-defined]
    output = torch.zeros(1000)
    records = [Record(tracker) for _ in range(9)]
    calls = [lambda: output for _ in range(9)]
    partials = [partial(print, output, file=tracker) for _ in range(9)]

    arrays = [torch.zeros(1000).numpy() for _ in range(9)]

    found = by_path(read_containers(sys._getframe(), is_here))

    assert all(4000 <= found[path].item_bytes < 6000 for path in ("records", "calls", "partials", "arrays"))
    assert (len(records), len(calls), len(partials), len(arrays)) == (9, 9, 9, 9)
    assert not any(type(each) is dict for each in gc.get_referents(records[-1]))  # its attributes are as fast as before


def test_the_size_of_a_kept_model_is_that_of_its_tensors() -> None:
    """A copy of the model, or an optimizer with its state, for each epoch; the same model again takes nothing."""
    optimizers, models, same = [], [], [torch.nn.Linear(30, 30)] * 9
    for _ in range(9):
        model = torch.nn.Sequential(torch.nn.Linear(30, 30), torch.nn.BatchNorm1d(30))
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.randn(4, 30)).sum().backward()
        optimizer.step()
        models.append(model)
        optimizers.append(optimizer)

    found = by_path(read_containers(sys._getframe(), is_here))

    weights = 4 * (30 * 30 + 3 * 30)
    assert weights < found["models"].item_bytes < weights + 1000
    assert 2 * weights < found["optimizers"].item_bytes < 2 * weights + 1000
    assert found["same"].item_bytes == 8
    assert (len(models), len(optimizers), len(same)) == (9, 9, 9)


def spike(loss: torch.Tensor) -> None:
    doubled = loss * 2
    raise ValueError(f"{len(doubled)} losses are too high")


def failure(elements: int) -> ValueError:
    try:
        spike(torch.zeros(elements))
    except ValueError as error:
        return error

    raise AssertionError


def test_an_exception_has_the_size_of_the_variables_that_it_keeps() -> None:
    """Its traceback refers to the frames of the functions that it has ended, until it is dropped."""
    errors = [failure(1 << 18) for _ in range(9)]

    held = by_path(read_containers(sys._getframe(), is_here))["errors"]

    assert (held.size, held.item) == (9, "ValueError")
    assert 2 << 20 <= held.item_bytes < 3 << 20  # the losses, and twice that
    assert len(errors) == 9


def test_a_few_large_elements_are_seen() -> None:
    """One is kept in each epoch, of which there are few."""
    states = [{"weight": torch.zeros(1 << 18)} for _ in range(2)]
    small = [{"weight": torch.zeros(10)} for _ in range(2)]

    found = by_path(read_containers(sys._getframe(), is_here))

    assert found["states"].size == 2
    assert "small" not in found
    assert (len(states), len(small)) == (2, 2)


def test_open_figures_of_pyplot_are_seen() -> None:
    """The size of one is its picture's; closed ones are gone."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    try:
        for _ in range(9):
            pyplot.figure(figsize=(2, 1), dpi=100)

        held = by_path(read_containers(sys._getframe(), is_here))["pyplot"]
        assert (held.kind, held.size, held.item_bytes) == ("figures", 9, 200 * 100 * 4)
        assert held.function == "test_open_figures_of_pyplot_are_seen"
    finally:
        pyplot.close("all")

    assert "pyplot" not in by_path(read_containers(sys._getframe(), is_here))


def test_a_container_is_the_same_under_another_name() -> None:
    """One reading comes while a method runs, `self.history`, the other while its caller does, `tracker.history`."""
    tracker = Tracker()
    tracker.history += [torch.zeros(10) for _ in range(9)]

    def method(self: Tracker) -> dict[tuple[str, int], ReachableObjects]:
        return read_containers(sys._getframe(), is_here)

    inside, outside = method(tracker), read_containers(sys._getframe(), is_here)

    keys = [{key for key, held in found.items() if held.path.endswith(".history")} for found in (inside, outside)]
    assert len(keys[0]) == 1
    assert keys[0] == keys[1]
    assert {inside[key].path for key in keys[0]} == {"self.history"}


def test_a_reading_leaves_no_references_behind() -> None:
    """A variable that the other thread deletes afterwards is gone at once."""
    ready, seen, gone = threading.Event(), threading.Event(), threading.Event()
    freed: list[bool] = []

    class Batch:
        def __del__(self) -> None:
            gone.set()

    def train() -> None:
        batch = Batch()
        ready.set()
        seen.wait(240)
        del batch
        freed.append(gone.is_set())

    thread = threading.Thread(target=train)
    thread.start()
    ready.wait(240)
    read_containers(sys._current_frames()[thread.ident or 0], is_here)
    seen.set()
    thread.join(240)

    assert freed == [True]


def config_of_caller() -> dict[str, Any]:
    """Return the variables of the caller, as libraries of parameters do."""
    return sys._getframe(1).f_locals


def test_a_reading_leaves_what_locals_returned_as_it_is() -> None:
    """Before Python 3.13 the frame has one dict for all who ask, which a reading would extend."""

    def train(rate: float) -> dict[str, Any]:
        parameters = locals()
        losses = list(range(20))
        read_containers(sys._getframe(), is_here)
        assert len(losses) == 20
        return parameters

    assert train(0.1) == {"rate": 0.1}


def test_a_reading_does_not_empty_variables_that_another_function_keeps() -> None:
    """The containers of the function are seen nevertheless."""

    def train(rate: float) -> tuple[dict[str, Any], dict[str, ReachableObjects]]:
        parameters = config_of_caller()
        losses = [rate] * 20
        found = by_path(read_containers(sys._getframe(), is_here))
        del losses
        return parameters, found

    parameters, found = train(0.1)

    assert parameters["rate"] == 0.1
    assert found["losses"].size == 20


def test_variables_are_seen_however_long_a_collection_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may begin with the first allocation of a reading; without the variables nothing could be compared."""
    kept = [torch.zeros(10) for _ in range(9)]
    times = count(step=BUDGET_NS)
    monkeypatch.setattr(
        "traceml.recorder.growth.reachable_objects.time", SimpleNamespace(thread_time_ns=times.__next__)
    )

    found = by_path(read_containers(sys._getframe(), is_here))

    assert found["kept"].size == len(kept)


def test_variables_below_deep_calls_of_a_library_are_seen() -> None:
    """As of a script that saves a figure."""
    kept = [torch.zeros(10) for _ in range(9)]
    library: dict[str, Any] = {"read": read_containers, "frame": sys._getframe, "is_user": is_here}
    code = "def call(depth):\n    return call(depth - 1) if depth else read(frame(), is_user)"
    exec(compile(code, "/lib/draw.py", "exec"), library)

    assert by_path(library["call"](60))["kept"].size == len(kept)
    assert "kept" not in by_path(library["call"](600))


def test_a_sum_of_losses_has_a_long_graph() -> None:
    """A tensor with the graphs of all steps is seen with the operations in a row."""
    weight = torch.ones(1, requires_grad=True)
    total = torch.zeros(1)
    for _ in range(100):
        total = total + weight

    held = by_path(read_containers(sys._getframe(), is_here))["total"]

    assert held.kind == "graph"
    assert held.holds_graph
    assert 100 <= held.size <= 102


class Watched:
    """A watch over this thread, with a clock, steps and an amount of memory that the test moves.

    That of this process does not do: what earlier tests have freed is used again, and the kernel takes pages back.
    """

    def __init__(self, bytes_per_cycle: int = 10 << 20) -> None:
        self.notes: list[dict[str, Any]] = []
        self.slots = [0] * OPEN_SLOTS
        self.at_ns, self.used_bytes, self.bytes_per_cycle = 0, 1 << 30, bytes_per_cycle
        ident = threading.get_ident()
        self.watch = GrowthWatch(self.slots, lambda: ident, is_here, self.note, lambda: self.at_ns)
        self.watch._read_bytes = lambda: self.used_bytes  # type: ignore[method-assign]

    def note(self, kind: str, **facts: Any) -> None:
        self.notes.append({"kind": kind, **facts})

    def cycle(self) -> None:
        self.at_ns += SECOND
        self.used_bytes += self.bytes_per_cycle
        self.slots[Slot.STEP] += 10
        self.watch(last=False)


def test_the_list_that_grows_with_memory_is_noted() -> None:
    """Twelve cycles later, once: its rate per step, its line, and the cost of reading."""
    watched, kept = Watched(), []
    for _ in range(16):
        kept.extend(bytearray(1 << 10) for _ in range(10))
        watched.cycle()

    (note,) = watched.notes
    (grown,) = [each for each in note["grown"] if each["path"] == "kept"]
    assert (note["kind"], grown["kind"], grown["per_step"]) == ("growth", "list", 1.0)
    assert grown["function"] == "test_the_list_that_grows_with_memory_is_noted"
    assert "kept.extend" in Path(__file__).read_text().splitlines()[grown["line"] - 1]
    assert grown["item_bytes"] >= 1 << 10
    assert note["cost_ms"] < 1000


@pytest.mark.parametrize(("layers", "paths"), [("abcd", {"by_layer[...]"}), ("ab", {"by_layer['a']", "by_layer['b']"})])
def test_many_lists_in_one_container_are_noted_as_one(layers: str, paths: set[str]) -> None:
    """Each of them, with the outputs of one layer, is little of what grows."""
    watched, by_layer = Watched(), {layer: [bytearray(8)] for layer in layers}
    for _ in range(16):
        for layer in layers:
            by_layer[layer].extend(bytearray(1 << 10) for _ in range(10))

        watched.cycle()

    (note,) = watched.notes
    grown = [each for each in note["grown"] if each["path"].startswith("by_layer")]
    assert {each["path"] for each in grown} == paths
    assert sum(each["per_step"] for each in grown) == len(layers)
    assert grown[0]["count"] > 80 * len(layers) / len(grown)
    assert grown[0]["item_bytes"] >= 1 << 10
    assert "by_layer[layer].extend" in Path(__file__).read_text().splitlines()[grown[0]["line"] - 1]


def test_lines_are_searched_for_of_what_grows_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search takes 10 ms in a long file, and each of a model's layers may have a list."""
    searched = []
    monkeypatch.setattr(growing_lines, "appending_line", lambda _file, path, *_, **__: searched.append(path))
    watched, a, b, c, d, e, f, g = Watched(), [], [], [], [], [], [], []
    kept = {"a": a, "b": b, "c": c, "d": d, "e": e, "f": f, "g": g}
    for _ in range(16):
        for number, each in enumerate(kept.values(), 1):
            each.extend(bytearray(number << 10) for _ in range(10))

        watched.cycle()

    (note,) = watched.notes
    assert [each["path"] for each in note["grown"]] == searched == ["g", "f", "e", "d", "c"]


@pytest.mark.parametrize("cycles_per_element", [40, 100])
def test_a_list_that_grows_in_each_epoch_is_noted(cycles_per_element: int) -> None:
    """Memory grows by little in a minute, and not at all in most of it."""
    watched, epochs = Watched(0), [bytearray(16) for _ in range(8)]
    for cycle in range(16 * cycles_per_element):
        if cycle % cycles_per_element == 0:
            epochs.append(bytearray(16))
            watched.used_bytes += 8 << 20

        watched.cycle()

    grown = [each for note in watched.notes for each in note["grown"] if each["path"] == "epochs"]
    assert grown
    steps_per_element = 10 * cycles_per_element
    assert 0.9 <= grown[0]["per_step"] * steps_per_element <= 2.1  # it begins at any time between two elements


def test_memory_of_this_process_is_read() -> None:
    """Its resident memory, as the kernel counts it."""
    read_bytes = GrowthWatch([], threading.get_ident, is_here, print)._read_bytes

    assert read_bytes() == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)


def test_containers_are_not_read_while_memory_is_level() -> None:
    """A list of numbers grows, memory does not."""
    watched, numbers = Watched(0), []
    for number in range(40):
        numbers += [number]
        watched.cycle()

    assert watched.notes == []


def more_of(kind: str, kept: Any) -> Any:
    """Return a copy of what was kept that is 1 MiB longer, a library's or Python's own; a list has 8 elements more."""
    match kind:
        case "ndarray":
            return np.concatenate([np.zeros(0) if kept is None else kept, np.zeros(1 << 17)])
        case "Tensor":
            return torch.cat([torch.zeros(0, dtype=torch.int64) if kept is None else kept, torch.ones(1 << 17).long()])
        case "DataFrame":
            import pandas  # 0.3 s of CPU in each worker that collects this file

            new = pandas.DataFrame({"loss": np.zeros(1 << 17)})
            return new if kept is None else pandas.concat([kept, new])
        case "str":
            return ("" if kept is None else kept) + "x" * (1 << 20)
        case _:
            return [*(kept or ()), *(bytearray(1 << 10) for _ in range(8))]


@pytest.mark.parametrize(
    ("kind", "per_step"),
    [("ndarray", 13107.2), ("Tensor", 13107.2), ("DataFrame", 13107.2), ("str", 104857.6), ("list", 0.8)],
)
def test_what_grows_by_copies_is_noted(kind: str, per_step: float) -> None:
    """A longer one takes its place in each step, so that it is another object each time."""
    watched, longer, batch = Watched(), None, None
    for _ in range(16):
        longer = more_of(kind, longer)
        batch = np.zeros(1 << 20)
        watched.cycle()

    (note,) = watched.notes
    (grown,) = note["grown"]
    assert batch is not None
    assert (grown["path"], grown["kind"]) == ("longer", kind)
    assert grown["is_copied"] or kind == "list"  # a new list may be where the one before was
    assert grown["per_step"] == pytest.approx(per_step)
    assert grown["function"] == "test_what_grows_by_copies_is_noted"
    assert "longer = more_of" in Path(__file__).read_text().splitlines()[grown["line"] - 1]


@pytest.mark.parametrize(("is_copied", "readings"), [(True, 2), (False, 1)])
def test_what_grows_by_copies_is_read_again_soon(is_copied: bool, readings: int) -> None:
    """Their rise is uneven, so that a short run too has to show that they are kept."""
    watched = Watched()
    mine: Any = np.zeros(1 << 17) if is_copied else [bytearray(1 << 10) for _ in range(8)]
    for _ in range(24):
        if is_copied:
            mine = more_of("ndarray", mine)
        else:
            mine.append(bytearray(1 << 10))

        watched.cycle()

    assert [len(note["grown"]) for note in watched.notes] == [1] * readings


def test_a_copy_where_another_container_was_is_known_by_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python gives the memory of a list that is freed to the next one."""
    watched = Watched()
    other = ReachableObjects("other", __file__, "main", "list", 9, "int", 32, holds_graph=False, of_dataset=False)
    kept = other._replace(path="kept", item="bytearray", item_bytes=1 << 20, size=80)
    readings = iter([{("", 1): other, ("", 2): kept}, {("", 1): kept._replace(size=160)}])
    monkeypatch.setattr(watched.watch, "_read_containers", lambda: next(readings))
    for _ in range(10):
        watched.cycle()

    (note,) = watched.notes
    assert [(each["path"], each["is_copied"], each["count"]) for each in note["grown"]] == [("kept", True, 160)]


CODE = """class Tracker:
    def keep(self, out):
        self.history.append(out)  # losses.append(1)

def main():
    losses.append(1)
    more.append(1)
    more.append(2)
    metrics["loss"].append(3)
    total = total + loss
    table[key] = value
    if table[key] == value:
        seen.add(1)
    count += 1
    model[0].register_forward_pre_hook(hook)  # optimizer.add_param_group()
    figure, axes = plt.subplots(2)
    axes.figure.savefig("a.png")

class Log:
    def add(self, row): self.rows.append(row)
"""


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("losses", (6, "main")),
        ("trainer.history", (3, "keep")),
        ("more", None),
        ("metrics['loss']", (9, "main")),
        ("metrics['val.loss']", (9, "main")),
        ("metrics[...]", (9, "main")),
        ("total", (10, "main")),
        ("table", (11, "main")),
        ("seen", (13, "main")),
        ("count", (14, "main")),
        ("log.rows", (20, "add")),
        ("absent", None),
    ],
)
def test_a_line_is_reported_only_where_it_is_the_only_one(
    tmp_path: Path, path: str, line: tuple[int, str] | None
) -> None:
    """Comments and comparisons do not count."""
    file = tmp_path / "train.py"
    file.write_text(CODE)

    assert appending_line(str(file), path) == line


COPIES = """def main():
    frame = pandas.concat(
        [frame, new]
    )
    frame.loss = 3
    history = np.append(history, [loss])
    text += line
    self.table = torch.cat([self.table, row])
    items = [*items, item]
    batch = np.concatenate(parts)
    batch = torch.stack(parts)
    frames = load(files)
"""


@pytest.mark.parametrize(
    ("path", "line"),
    [("frame", 2), ("history", 6), ("text", 7), ("self.table", 8), ("items", 9), ("batch", None), ("frames", None)],
)
def test_the_line_that_makes_a_longer_copy_is_reported(tmp_path: Path, path: str, line: int | None) -> None:
    """By a function that joins, or with itself on the right; where only one line does."""
    file = tmp_path / "train.py"
    file.write_text(COPIES)

    assert appending_line(str(file), path, is_copied=True) == (None if line is None else (line, "main"))


@pytest.mark.parametrize(("kind", "line"), [("hooks", (15, "main")), ("figures", (16, "main")), ("param_groups", None)])
def test_containers_of_libraries_grow_by_calls(tmp_path: Path, kind: str, line: tuple[int, str] | None) -> None:
    """Whatever the object is called."""
    file = tmp_path / "train.py"
    file.write_text(CODE)

    assert appending_line(str(file), "model", kind) == line
