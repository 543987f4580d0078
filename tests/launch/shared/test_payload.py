"""Values arrive unchanged and without copies; an argument that cannot be pickled is named."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from traceml.errors import PayloadError
from traceml.launch.shared import pickling
from traceml.launch.shared.payload import SerializedValue, dump, dump_call, dump_exception, load
from traceml.launch.shared.payload_buffer import PayloadBuffer, map_private

LARGE = 40_000  # floats: beyond what is put inside the pickle


def received(parcel: SerializedValue) -> PayloadBuffer:
    receiver = PayloadBuffer(parcel.size_bytes)
    for chunk in parcel.chunks():
        receiver.feed(chunk)

    return receiver


def sent(value: Any) -> Any:
    return load(received(dump(value)).memory())


TENSORS = {  # made in the tests: on several cores that starts threads, which no worker could be forked with
    "small": lambda: torch.arange(6.0).reshape(2, 3),
    "large": lambda: torch.arange(LARGE, dtype=torch.float64),
    "bfloat16": lambda: torch.randn(LARGE).bfloat16(),
    "float8": lambda: torch.randn(LARGE).to(torch.float8_e4m3fn),
    "uint16": lambda: torch.arange(LARGE).to(torch.uint16),
    "boolean": lambda: torch.rand(LARGE) > 0.5,
    "complex": lambda: torch.randn(LARGE, dtype=torch.complex64),
    "conjugated": lambda: torch.randn(LARGE, dtype=torch.complex64).conj(),
    "empty": lambda: torch.zeros(0, 3),
    "scalar": lambda: torch.tensor(3),
    "transposed": lambda: torch.randn(200, 300).t(),
    "strided": lambda: torch.randn(LARGE)[::7],
    "channels last": lambda: torch.randn(2, 8, 40, 50).contiguous(memory_format=torch.channels_last),
    "expanded": lambda: torch.randn(1).expand(1000),
    "sparse": lambda: torch.eye(300).to_sparse(),
    "requires grad": lambda: torch.randn(3, requires_grad=True),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_arrive_as_they_were(name: str) -> None:
    """Values, dtype, shape, strides, layout and whether a gradient is wanted are kept."""
    tensor = TENSORS[name]()
    arrived = sent({"x": [tensor]})["x"][0]

    assert (arrived.dtype, arrived.shape, arrived.layout) == (tensor.dtype, tensor.shape, tensor.layout)
    assert arrived.requires_grad == tensor.requires_grad
    assert torch.equal(arrived.to_dense(), tensor.to_dense())
    if tensor.layout == torch.strided:
        assert arrived.stride() == tensor.stride()


def test_tensors_that_share_memory_still_do() -> None:
    """A view, written to, changes its base, and a tied weight stays tied."""
    base = torch.zeros(300, 400)
    tied = torch.nn.Linear(300, 300)
    other = torch.nn.Linear(300, 300)
    other.weight = tied.weight
    base, view, modules = sent((base, base[10:20], torch.nn.ModuleList([tied, other])))
    view[0, 0] = 5

    assert base[10, 0] == 5
    assert modules[0].weight is modules[1].weight
    assert isinstance(modules[0].weight, torch.nn.Parameter)


def test_a_model_and_its_optimizer_train_on() -> None:
    """Values sent together stay related, can be written to, and their tensors can grow."""
    model = torch.nn.Linear(300, 300)
    model, optimizer = sent((model, torch.optim.Adam(model.parameters())))
    before = model.weight.detach().clone()
    model(torch.ones(2, 300)).sum().backward()
    optimizer.step()

    assert not torch.equal(model.weight, before)
    assert sent(torch.ones(3)).resize_(1000).shape == (1000,)


ARRAYS = {
    "large": np.arange(LARGE, dtype=np.int64),
    "fortran": np.asfortranarray(np.random.default_rng(0).random((200, 300))),
    "strided": np.arange(LARGE)[::3],
    "structured": np.zeros(LARGE, dtype=[("a", "i4"), ("b", "f8", (2,))]),
    "objects": np.array([1, "two", None, {"three": 3}], dtype=object),
    "empty": np.zeros((0, 4)),
    "dates": np.arange(LARGE).astype("datetime64[s]"),
    "text": np.array(["a", "bcd"] * LARGE),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_arrive_as_they_were(name: str) -> None:
    """Values, dtype and shape are kept, and the array can be written to."""
    arrived = sent(ARRAYS[name])

    assert arrived.dtype == ARRAYS[name].dtype
    assert np.array_equal(arrived, ARRAYS[name])
    assert arrived.flags.writeable


def test_other_values_arrive_as_they_were() -> None:
    """Tables, long texts and bytes, read-only arrays, what refers to itself."""
    import pandas as pd  # 0.3 s of CPU in each worker that collects this file

    frozen = np.arange(LARGE)
    frozen.flags.writeable = False
    loop: list[Any] = [b"x" * 1_000_000, bytearray(b"y" * 1_000_000), "z" * 1_000_000]
    loop.append(loop)
    frame = pd.DataFrame({"a": np.arange(LARGE), "b": ["text"] * LARGE})
    arrived, table, constant = sent((loop, frame, frozen))

    assert arrived[:3] == loop[:3]
    assert arrived[3] is arrived
    assert table.equals(frame)
    assert not constant.flags.writeable


def test_a_large_tensor_is_not_copied() -> None:
    """It leaves from its own memory, and is used where it was received."""
    tensor = torch.arange(LARGE, dtype=torch.float32)
    parcel = dump({"x": tensor, "array": tensor.numpy()})
    leaving = [np.frombuffer(chunk, np.uint8).ctypes.data for chunk in parcel.chunks() if len(chunk) == tensor.nbytes]
    memory = received(parcel).memory()
    start = np.frombuffer(memory, np.uint8).ctypes.data
    arrived = load(memory)

    assert leaving == [tensor.data_ptr()] * 2
    assert start <= arrived["x"].data_ptr() < start + len(memory)
    assert start <= arrived["array"].ctypes.data < start + len(memory)
    assert arrived["x"].data_ptr() % 64 == 0


def test_processes_share_what_was_received_once() -> None:
    """A shared parcel is mapped by each, and what one writes is its own."""
    parcel = dump(torch.zeros(LARGE))
    receiver = PayloadBuffer(parcel.size_bytes, shared=True)
    for chunk in parcel.chunks():
        receiver.feed(chunk)

    assert receiver.complete
    assert receiver.fd is not None
    first, second = load(map_private(receiver.fd)), load(map_private(receiver.fd))
    receiver.close()
    first += 1

    assert first.sum() == LARGE
    assert second.sum() == 0


@pytest.mark.process
def test_a_file_in_memory_is_opened_by_another_process() -> None:
    """A child opens a buffer of its parent by path and changes it; nothing is copied."""
    parcel = dump(torch.zeros(LARGE))
    receiver = PayloadBuffer(parcel.size_bytes, shared=True)
    for chunk in parcel.chunks():
        receiver.feed(chunk)

    code = """
import os, sys
from traceml.launch.shared.payload import load
from traceml.launch.shared.payload_buffer import PayloadBuffer, can_reach
assert can_reach(os.getppid()) and not can_reach(2**22 + 1)
load(PayloadBuffer.open_path(sys.argv[1]).memory()).add_(1)
"""
    subprocess.run([sys.executable, "-c", code, receiver.path], check=True)
    arrived = load(receiver.memory())
    receiver.close()

    assert arrived.sum() == LARGE


def test_a_receiver_takes_what_was_announced() -> None:
    """Too much and too little are errors that say by how much."""
    receiver = PayloadBuffer(10)
    receiver.feed(b"12345")

    with pytest.raises(PayloadError, match="only 5 of 10 bytes"):
        receiver.memory()

    with pytest.raises(PayloadError, match="3 bytes too many"):
        receiver.feed(b"12345678")


@pytest.mark.parametrize("junk", [b"", b"short", b"no parcel at all, but long enough", bytes(dump([1]))[:-1]])
def test_what_is_no_parcel_is_refused(junk: bytes) -> None:
    """Bytes that are not ours give an error of ours."""
    with pytest.raises(PayloadError, match="the arguments"):
        load(junk, what="the arguments")


class Loader:
    def __init__(self) -> None:
        self._lock = threading.Lock()


class Slotted:
    __slots__ = ("inner",)


class Refusing:
    def __getstate__(self) -> object:
        raise ZeroDivisionError("no state today")


def train(model: object, epochs: int = 1, *more: object) -> None: ...


def _calls() -> list[tuple[Any, tuple[Any, ...], dict[str, Any], str]]:
    lock = threading.Lock()
    model, slotted = torch.nn.Linear(2, 2), Slotted()
    model.loader, slotted.inner = Loader(), [lock]
    named = "cannot pickle '_thread.lock' object"
    return [
        (train, (model,), {}, f"argument 'model': {named}"),
        (train, (1, 2, lock), {}, f"argument 2: {named}"),
        (train, (1,), {"epochs": {"a": [0, lock]}}, f"argument 'epochs': {named}"),
        (train, (slotted,), {}, f"argument 'model': {named}"),
        (train, (Refusing(),), {}, "argument 'model': cannot be pickled (ZeroDivisionError: no state today)"),
        (train, (iter(x for x in "abc"),), {}, "argument 'model': cannot pickle 'generator' object"),
        (lambda: lock, (), {}, f"function '<lambda>': {named}"),
        (lambda x=lock: x, (), {}, f"function '<lambda>': {named}"),
        (Loader().__init__, (), {}, f"function '__init__': {named}"),
    ]


@pytest.mark.parametrize("number", range(9))
def test_what_cannot_be_pickled_is_named(number: int) -> None:
    """The error names the argument, and what to do."""
    func, args, kwargs, text = _calls()[number]
    with pytest.raises(PayloadError) as caught:
        dump_call(func, args, kwargs)

    assert str(caught.value).startswith(f"{text}. Locks, open files")
    assert isinstance(caught.value, TypeError)


def test_a_list_too_deep_is_reported() -> None:
    """Python's recursion limit is no crash."""
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]

    with pytest.raises(PayloadError, match=r"the result.*nested too deeply"):
        dump(deep, what="the result")

    while deep:  # freed level by level
        deep = deep.pop()


# What a user's script may define; one process sends, another calls and sends the result back.
SCRIPT = """
import dataclasses, enum, sys
from beside import shift
class Colour(enum.Enum):
    RED = 1
@dataclasses.dataclass
class Point:
    x: int
    colour: Colour = Colour.RED
    def moved(self):
        return Point(shift(self.x) + STEP)
STEP = 10
def outer(k):
    def inner(point):
        return [point.moved(), (lambda y: y * k)(2), Point, Colour.RED]
    return inner
if __name__ == "__main__":
    from traceml.launch.shared.payload import dump_call, load
    from pathlib import Path
    import subprocess
    Path("call").write_bytes(bytes(dump_call(outer(21), (Point(1),), {})))
    subprocess.run([sys.executable, "callee.py"], check=True)
    point, number, kind, colour = load(bytearray(Path("result").read_bytes()))
    STEP = 1000
    print(point, number, kind is Point, type(point) is Point, colour is Colour.RED, point.moved().x)
"""
CALLEE = """
from pathlib import Path
from traceml.launch.shared.payload import dump, load
func, args, kwargs = load(bytearray(Path("call").read_bytes()))
Path("result").write_bytes(bytes(dump(func(*args, **kwargs))))
"""


def run_in(folder: Path, **files: str) -> str:
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)

    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.process
def test_what_a_script_defines_travels_by_value_and_comes_home(tmp_path: Path) -> None:
    """Closures, lambdas, dataclasses and enums of `__main__`; a class that returns is the one that went, unchanged."""
    out = run_in(tmp_path, script=SCRIPT, callee=CALLEE, beside="def shift(x): return x + 100")

    assert out == "Point(x=111, colour=<Colour.RED: 1>) 42 True True True 1211\n"


@pytest.mark.process
def test_a_function_that_is_not_there_is_reported(tmp_path: Path) -> None:
    """If a module lacks a name that was sent, the error names both and gives advice."""
    callee = CALLEE.replace("from pathlib", "import beside; del beside.shift\nfrom pathlib", 1)
    caught = "try:\n    exec({!r})\nexcept Exception as error:\n    print(error)\n    raise SystemExit(3)\n"
    script = SCRIPT.replace("check=True", "check=False").split("    point, number")[0]
    out = run_in(tmp_path, script=script, callee=caught.format(callee), beside="def shift(x): return x + 100")

    assert "cannot be unpickled here: AttributeError: Can't get attribute 'shift' on <module 'beside'" in out
    assert "register_pickle_by_value" in out


class PlainError(Exception): ...


class CodedError(Exception):
    """Cannot be made again from its args, as many cannot."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{text} ({code})")


class HoldingError(Exception):
    def __init__(self, lock: Any) -> None:
        super().__init__("held", lock)


def test_exceptions_travel_when_they_would_arrive() -> None:
    """They arrive as they were; one that is made of what cannot be pickled is not sent as an object."""
    parcel = dump_exception(PlainError("why", 3))
    assert parcel is not None
    arrived = load(bytes(parcel))

    assert (type(arrived), arrived.args) == (PlainError, ("why", 3))
    coded = dump_exception(CodedError(3, "bad"))
    assert coded is not None
    assert (type(load(bytes(coded))), str(load(bytes(coded)))) == (CodedError, "bad (3)")
    assert dump_exception(HoldingError(threading.Lock())) is None


def test_a_tensor_of_a_device_that_is_not_here_arrives_on_the_cpu() -> None:
    """A launcher without GPUs can take what workers return."""
    data = bytearray(torch.arange(4.0).numpy().tobytes())
    storage = pickling._storage(data, "cuda:97")

    assert torch.frombuffer(data, dtype=torch.float32).tolist() == [0, 1, 2, 3]
    assert storage.device.type == "cpu"
    assert storage.nbytes() == 16


@dataclasses.dataclass
class Box:
    content: Any


def test_small_values_make_small_parcels() -> None:
    """A trivial call costs little more than its pickle."""
    assert dump(Box(1)).size_bytes < 200
