"""Artifacts, images, histograms and long texts: what arrives in the run's folder is what was given."""

from __future__ import annotations

import hashlib
import io
import math
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from tests.aggregator.conftest import Serving
from tests.track.conftest import Script, Stored, ended_run, finish
from traceml.aggregator.unfinished_runs import finish_flights
from traceml.database.file_contents import Content, LaterBytes, RefusedFileError, copy_content
from traceml.errors import ArgumentTypeError, UsageError
from traceml.track.rank import media_encoding
from traceml.track.rank.media_encoding import histogram_of, image_of


def test_a_large_artifact_that_is_deleted_at_once(script: Script, tmp_path: Path) -> None:
    """200 MB, unlinked when the call has returned; the call takes no time, and the copy is whole."""
    out = finish(
        script("""
        import hashlib, os, time, traceml
        block = os.urandom(1 << 20)
        digest = hashlib.sha256()
        with open("model.pt", "wb") as file:
            for _ in range(200):
                file.write(block)
                digest.update(block)
        with traceml.Experiment("large", backend=()) as experiment:
            experiment.log_artifact("model.pt", "weights/best.pt")
            os.unlink("model.pt")
            for i in range(1000):
                experiment.log_metric("x", i)
        print(digest.hexdigest())
        """)
    )

    stored = ended_run(tmp_path / "traceml_runs")
    (row,) = stored.of("artifact")
    assert (row["name"], row["size"], row["sha256"]) == ("weights/best.pt", 200 << 20, out.strip())
    with (stored.run_dir / row["path"]).open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == out.strip()
    assert len(stored.values("x")) == 1000
    assert [each["kind"] for each in stored.rows if each["kind"] != "collected"] == ["experiment", "artifact", "end"]


def test_files_of_a_rank_that_cannot_reach_the_folder(script: Script, serving: Serving, tmp_path: Path) -> None:
    """They travel in pieces, compressed where that helps, and are put together by the aggregator."""
    process = script(
        """
        import os, sys, traceml
        from tests.track.rank.elsewhere import hide
        hide(sys.argv[1])
        noise, zeros = os.urandom(5_000_000), bytes(3_000_000)
        for name, data in (("noise", noise), ("zeros", zeros), ("empty", b""), ("twin", noise)):
            with open(name, "wb") as file:
                file.write(data)
        traceml.init()
        for name in ("noise", "zeros", "empty", "twin"):
            traceml.log_artifact(name)
            os.rename(name, name + ".kept")
        traceml.log_metric("x", 1)
        """,
        serving.folder,
        serving=serving,
        PYTHONPATH=str(Path(__file__).parents[3]),
    )
    finish(process)

    stored = ended_run(serving.folder)
    assert stored.values("x") == [1.0]
    rows = {row["name"]: row for row in stored.of("artifact")}
    for name in ("noise", "zeros", "empty", "twin"):
        assert (stored.run_dir / rows[name]["path"]).read_bytes() == (tmp_path / f"{name}.kept").read_bytes()
    assert not list((tmp_path / "traceml_runs" / ".flights").iterdir())


def test_files_of_a_rank_that_is_killed_before_anybody_took_them(script: Script, tmp_path: Path) -> None:
    """They were copied, so they are recovered, each under its name."""
    process = script("""
        import os, pathlib, time, traceml
        traceml.init(on_missing="warn", connect_timeout=0.1)
        pathlib.Path("model.bin").write_bytes(b"weights" * 1000)
        traceml.log_artifact("model.bin", "first")
        traceml.log_artifact("model.bin", "second")
        flights = pathlib.Path("traceml_runs", ".flights")
        while len(list(flights.glob("*.files/.*.row"))) < 2 or list(flights.glob("*.files/.*.part")):
            time.sleep(0.01)
        os.kill(os.getpid(), 9)
        """)
    finish(process, -9)
    (run_dir,) = finish_flights(tmp_path / "traceml_runs").runs

    stored = Stored(run_dir)
    assert [row["name"] for row in stored.of("artifact")] == ["first", "second"]
    for row in stored.of("artifact"):
        assert (run_dir / row["path"]).read_bytes() == b"weights" * 1000

    assert not list((tmp_path / "traceml_runs" / ".flights").iterdir())


BEGUN = """
import os, signal, numpy, torch, traceml
images = numpy.random.default_rng(0).integers(0, 256, (64, 96, 96, 3), dtype=numpy.uint8)
numpy.save("images.npy", images)
with open("model.pt", "wb") as file:
    file.write(os.urandom(30_000_000))
with open("changed.txt", "w") as file:
    file.write("before")
"""
BEGIN = """
for step, image in enumerate(images):
    traceml.log_image("sample", image if step % 2 else torch.from_numpy(image), step=step)
traceml.log_text("long", "x" * 2_000_000, step=5)
traceml.log_artifact("model.pt")
traceml.log_artifact("changed.txt")
with open("changed.txt", "w") as file:
    file.write("after all")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("has_aggregator", [True, False])
def test_files_of_a_rank_that_is_killed_right_after_the_call(
    script: Script, serving: Serving, tmp_path: Path, has_aggregator: bool
) -> None:
    """They are finished by the aggregator; a file of the user that has changed since is told of."""
    if has_aggregator:
        start = "recorder = traceml.init()\nimport time\nwhile recorder.run_dir is None: time.sleep(0.01)"
        finish(script(BEGUN + start + BEGIN, serving.folder, serving=serving), -9)
        stored = ended_run(serving.folder)
    else:
        finish(script(f"{BEGUN}traceml.init(on_missing='warn', connect_timeout=0.1){BEGIN}"), -9)
        (run_dir,) = finish_flights(tmp_path / "traceml_runs").runs
        stored = Stored(run_dir)

    images = np.load(tmp_path / "images.npy")
    rows = stored.of("image")
    assert sorted(row["step"] for row in rows) == list(range(64))
    for row in rows:
        assert (np.asarray(Image.open(stored.run_dir / row["path"])) == images[row["step"]]).all()

    files = {row["name"]: row for row in stored.of("artifact")}
    assert (stored.run_dir / files["long.txt"]["path"]).read_text() == "x" * 2_000_000
    assert (stored.run_dir / files["model.pt"]["path"]).read_bytes() == (tmp_path / "model.pt").read_bytes()
    assert files["model.pt"]["size"] == 30_000_000
    if "changed.txt" not in files:  # else it was copied before it changed
        [refused] = stored.of("refused")
        assert (refused["name"], refused["what"]) == ("changed.txt", "artifact")
        assert "was changed before it was copied" in refused["why"]
    assert not list(Path(stored.run_dir.parent, ".flights").glob("*"))


def test_more_files_than_a_process_may_open(script: Script, tmp_path: Path) -> None:
    """All of a folder are copied, though it is removed; the script can open files of its own meanwhile."""
    process = script("""
        import os, pathlib, resource, shutil, traceml
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        pathlib.Path("out").mkdir()
        for number in range(600):
            pathlib.Path("out", f"{number}.txt").write_text(str(number))
        with traceml.Experiment("many", backend=()) as experiment:
            experiment.log_artifact("out")
            shutil.rmtree("out")
            with open("own.txt", "w") as file:
                file.write("mine")
        """)
    finish(process)

    stored = ended_run(tmp_path / "traceml_runs")
    texts = {row["name"]: (stored.run_dir / row["path"]).read_text() for row in stored.of("artifact")}
    assert texts == {f"out/{number}.txt": str(number) for number in range(600)}


def test_what_is_too_large_or_no_file(script: Script, tmp_path: Path) -> None:
    """Limits are kept: what is refused is told in the run and in a warning, and nothing raises; a missing file does."""
    process = script(
        """
        import numpy, traceml
        open("big", "wb").write(bytes(2000))
        traceml.init(local=True, max_artifact_bytes=1000, max_image_bytes=300)
        traceml.log_artifact("big")
        traceml.log_image("noise", numpy.random.rand(64, 64))
        traceml.log_image("shape", numpy.zeros((2, 2, 2, 2)))
        traceml.log_image("small", numpy.zeros((4, 4)))
        for wrong in ("nowhere", "/dev/null", "", "nu\\0ll", 5):
            try:
                traceml.log_artifact(wrong)
            except traceml.TraceMLError as error:
                print(error, [kind.__name__ for kind in (FileNotFoundError, OSError, TypeError)
                              if isinstance(error, kind)])

        try:
            traceml.log_image("drawing", "nowhere.png")
        except FileNotFoundError as error:
            print(error)
        """
    )
    out, err = process.communicate(timeout=240)

    assert process.returncode == 0, err
    nowhere, device, empty, null, number, image = out.splitlines()
    seen_from = f"there is no such file or folder, seen from {tmp_path}. Log it after it was written"
    assert nowhere == f"log_artifact('nowhere'): {seen_from} ['FileNotFoundError', 'OSError']"
    assert "is not a regular file" in device
    assert "the path is empty" in empty
    assert re.search(r"embedded null (byte|character in path) \['OSError'\]$", null)
    assert number == "the file or folder of log_artifact() must be a string or a path, not int 5 ['TypeError']"
    assert image == f"log_image('drawing', 'nowhere.png'): {seen_from}"
    assert err.count("is not logged") == 3
    stored = ended_run(tmp_path / "traceml_runs")
    assert [row["name"] for row in stored.of("image")] == ["small"]
    refused = {row["name"]: row["why"] for row in stored.of("refused")}
    assert refused == {
        "big": "it has 2000 bytes, above max_artifact_bytes=1000",
        "noise": "it has more than 300 bytes (max_image_bytes)",
        "shape": "an image must have 2 or 3 dimensions, not the shape (2, 2, 2, 2)",
    }


def test_folders_texts_and_histograms(script: Script, tmp_path: Path) -> None:
    """A folder's files keep their places in it; a text of megabytes becomes a file; a histogram has its counts."""
    finish(
        script("""
        import pathlib, traceml
        pathlib.Path("out/deep").mkdir(parents=True)
        pathlib.Path("out/a.txt").write_text("a")
        pathlib.Path("out/deep/b.json").write_text("{}")
        pathlib.Path("out/same.txt").write_text("a")
        traceml.log_artifact("out", "results")
        traceml.log_text("short", "s")
        traceml.log_text("long", "l" * 3_000_000)
        traceml.log_histogram("h", [1, 2, 2, 3, float("nan")], bins=2, step=3)
        traceml.log_histogram("fine", [0, 1], bins=65_536)
        """)
    )

    stored = ended_run(tmp_path / "traceml_runs")
    files = {row["name"]: (stored.run_dir / row["path"]).read_text() for row in stored.of("artifact")}
    assert files == {
        "results/a.txt": "a",
        "results/same.txt": "a",
        "results/deep/b.json": "{}",
        "long.txt": "l" * 3_000_000,
    }
    assert [row["text"] for row in stored.of("text")] == ["s"]
    row, fine = stored.of("histogram")
    assert (row["counts"], row["edges"], row["not_finite"], row["step"]) == ([1, 3], [1.0, 2.0, 3.0], 1, 3)
    assert (len(fine["counts"]), sum(fine["counts"]), len(fine["edges"])) == (65_536, 2, 65_537)


def test_the_working_folder(script: Script, tmp_path: Path) -> None:
    """Its files have its name, however it is given, and the runs in it are left out."""
    (tmp_path / "data" / "inner").mkdir(parents=True)
    finish(
        script("""
        import os, pathlib, traceml
        pathlib.Path("data/a.txt").write_text("a")
        pathlib.Path("data/inner/b.txt").write_text("b")
        pathlib.Path("traceml_runs").mkdir(mode=0o700)
        pathlib.Path("traceml_runs/model.pt").write_text("the user's own")
        pathlib.Path("traceml_runs/.flights").mkdir(mode=0o700)
        pathlib.Path("traceml_runs/.flights/1-2-journal").write_text("of another rank")
        traceml.init(local=True)
        traceml.log_metric("x", 1)
        traceml.flush()
        traceml.log_artifact(".", "all")
        os.chdir("data")
        traceml.log_artifact(".")
        os.chdir("inner")
        traceml.log_artifact("..")
        with traceml.Experiment("e", backend=[]) as experiment:
            experiment.log_file_artifact(".", "kept")
        """)
    )

    stored = ended_run(tmp_path / "traceml_runs")
    names = sorted(row["name"] for row in stored.of("artifact"))
    assert [name for name in names if name.startswith("kept")] == ["kept/inner/b.txt"]
    assert [name for name in names if not name.startswith(("all/", "kept/"))] == ["data/a.txt"] * 2 + [
        "data/inner/b.txt"
    ] * 2
    assert [name for name in names if "traceml_runs" in name] == ["all/traceml_runs/model.pt"]
    assert {"all/data/a.txt", "all/data/inner/b.txt"} <= {*names}


def encoded(content: Content) -> bytes:
    with TemporaryDirectory() as folder:
        part = Path(folder, "part")
        copy_content(content, part, kind="image", suffix=".png", limit_bytes=1 << 20)
        return part.read_bytes()


def pixels_of(image: object) -> np.ndarray:
    content, suffix = image_of(image, 1 << 20)
    assert suffix == ".png"
    return np.asarray(Image.open(io.BytesIO(encoded(content))))


RAMP = np.arange(90, dtype=np.uint8).reshape(6, 5, 3) * 2


@pytest.mark.parametrize(
    "image",
    [
        RAMP,
        RAMP.transpose(2, 0, 1),
        RAMP.astype(np.int64),
        RAMP / np.float32(255),
        torch.from_numpy(RAMP.copy()).permute(2, 0, 1),
        torch.from_numpy(RAMP / 255.0).requires_grad_(),
        torch.from_numpy(RAMP / 255.0).bfloat16().float(),
        Image.fromarray(RAMP),
    ],
    ids=["hwc", "chw", "int", "float", "tensor", "grad", "rounded", "pil"],
)
def test_images_keep_their_pixels(image: object) -> None:
    """Whatever holds them, the file shows the same pixels."""
    tolerance = 1 if isinstance(image, torch.Tensor) and image.dtype == torch.float32 else 0

    assert np.abs(pixels_of(image).astype(int) - RAMP).max() <= tolerance


def test_images_of_one_two_and_four_channels() -> None:
    """Grey, with and without alpha, and RGB with alpha; booleans are black and white, NaN is black."""
    rng = np.random.default_rng(0)
    for shape in ((5, 7), (5, 7, 2), (5, 7, 4)):
        array = rng.integers(0, 256, shape, dtype=np.uint8)
        assert (pixels_of(array) == array).all()

    assert pixels_of(np.array([[True, False]])).tolist() == [[255, 0]]
    assert pixels_of(np.array([[np.nan, 2.0, -1.0]])).tolist() == [[0, 255, 0]]


def test_images_are_copied_when_they_are_logged() -> None:
    """A later change in place does not change the image."""
    array, tensor = RAMP.copy(), torch.from_numpy(RAMP.copy())
    contents = [image_of(array, 1 << 20)[0], image_of(tensor, 1 << 20)[0]]
    array[:] = 0
    tensor.zero_()

    for content in contents:
        assert (np.asarray(Image.open(io.BytesIO(encoded(content)))) == RAMP).all()


def test_figures_and_files_are_images(tmp_path: Path) -> None:
    """A figure is drawn by its own library; files stay as they are."""
    matplotlib = pytest.importorskip("matplotlib.figure")
    figure = matplotlib.Figure(figsize=(2, 1), dpi=50)
    assert pixels_of(figure).shape[:2] == (50, 100)

    path = tmp_path / "photo.jpg"
    Image.fromarray(RAMP).save(path)
    assert image_of(path, 1 << 20) == (path.read_bytes(), ".jpg")


@pytest.mark.parametrize("image", [3, object(), {"a": 1}, io.BytesIO(b"\x89PNG")])
def test_what_is_no_image_is_reported(image: object) -> None:
    """With what would be one."""
    with pytest.raises(ArgumentTypeError, match="an image must be an array, a tensor"):
        image_of(image, 100)


def test_odd_shapes_are_refused() -> None:
    """Channels that no image has."""
    with pytest.raises(RefusedFileError, match="1 to 4 channels"):
        encoded(image_of(np.zeros((5, 5, 5)), 1 << 20)[0])


@pytest.mark.parametrize(
    "image",
    [torch.zeros(4, 4).to_sparse(), torch.zeros(4, 4, device="meta"), np.array([["a"]]), np.ma.masked_array([[1, 2]])],
    ids=["sparse", "meta", "text", "masked"],
)
def test_an_unusual_array_is_no_error_of_the_call(image: object) -> None:
    """Whether it is an image is found by the thread that encodes it."""
    assert isinstance(image_of(image, 1 << 20)[0], LaterBytes)


@pytest.mark.parametrize(
    "values",
    [
        [0.0, 1.0, 1.0, 4.0],
        iter((0, 1, 1, 4)),
        {0: 0, 1: 1, 2: 1, 3: 4}.values(),
        np.array([0, 1, 1, 4]),
        torch.tensor([0.0, 1.0, 1.0, 4.0]),
    ],
)
def test_histograms_agree_whatever_holds_the_values(values: object) -> None:
    """Lists, arrays and tensors give the same counts and edges."""
    assert histogram_of(values, 4) == ([1, 2, 0, 1], [0.0, 1.0, 2.0, 3.0, 4.0], 0)


def test_a_histogram_is_counted_whatever_the_script_has_set() -> None:
    """Its default device, and numpy's errors that it has raised, ended it at this call."""
    with torch.device("meta"), np.errstate(all="raise"):
        for values in (torch.tensor([0.0, 4.0], device="cpu"), np.array([-1e308, 1e-310, 1e308])):
            assert sum(histogram_of(values, 4)[0]) == len(values)


class OnDevice(torch.Tensor):
    """Tensor that records what is computed with it."""

    calls: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls.append(function.__name__)
        found = super().__torch_function__(function, types, args, kwargs or {})
        return found.as_subclass(torch.Tensor) if function.__name__ == "cpu" else found


def test_a_tensor_is_counted_on_the_host_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its device has no memory to spare: nothing is computed there."""
    monkeypatch.setattr(media_encoding, "_CHUNK_VALUES", 2)
    monkeypatch.setattr(OnDevice, "calls", [])
    values = torch.tensor([[0.0, 1.0, math.nan], [1.0, math.inf, 4.0], [math.nan, math.inf, 3.0]]).as_subclass(OnDevice)

    assert histogram_of(values, 4) == ([1, 2, 0, 2], [0.0, 1.0, 2.0, 3.0, 4.0], 4)
    assert {*OnDevice.calls} - {"__get__"} == {"detach", "cpu"}


def test_histograms_without_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list is counted without any library."""
    monkeypatch.delitem(sys.modules, "numpy")

    assert histogram_of([0.0, 1.0, 1.0, 4.0, float("inf")], 4) == ([1, 2, 0, 1], [0.0, 1.0, 2.0, 3.0, 4.0], 1)


def test_histograms_of_nothing_and_of_one_value() -> None:
    """They have a width all the same."""
    assert histogram_of([], 2) == ([0, 0], [0.0, 0.5, 1.0], 0)
    assert histogram_of(torch.tensor([float("nan")]), 2) == ([0, 0], [0.0, 0.5, 1.0], 1)
    assert sum(histogram_of(np.array([3.0, 3.0]), 2)[0]) == 2


@pytest.mark.parametrize("bins", [0, -1, 65_537, 10**9, 10**30, 1.5, None])
def test_a_number_of_intervals_that_no_row_can_hold_is_refused(bins: Any) -> None:
    """A billion intervals would take the memory of the host, and end the training."""
    with pytest.raises(UsageError, match="a histogram must have 1 to 65,536 intervals"):
        histogram_of([1.0], bins)


@pytest.mark.parametrize(
    "values",
    [
        [1.0, 1.0 + 2**-52],
        [0.1, 0.1 + 2**-55],
        [1e20, 1e20],
        [1e16, 1e16 + 2],
        [0.0, 5e-324],
        [-1e308, 1e308],
        [0.0, 1e308],
        [sys.float_info.max, sys.float_info.max],
    ],
)
@pytest.mark.parametrize("holder", [list, np.array, torch.DoubleTensor])
@pytest.mark.parametrize("has_numpy", [True, False])
def test_histograms_of_nearly_equal_and_of_extreme_values(
    values: list[float], holder: Any, has_numpy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each number is counted, between finite edges, without a warning."""
    held = holder(values)
    if not has_numpy:
        monkeypatch.delitem(sys.modules, "numpy")

    counts, edges, not_finite = histogram_of(held, 8)

    assert (sum(counts), not_finite) == (2, 0)
    assert len(edges) == 9
    assert edges == sorted(edges)
    assert all(map(math.isfinite, edges))
    assert edges[0] <= min(values) <= max(values) <= edges[-1]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (torch.ones(4).to_sparse(), r"a torch.sparse_coo one: to_dense\(\) makes one"),
        (torch.empty(4, device="meta"), "one without data"),
    ],
    ids=["sparse", "meta"],
)
def test_a_histogram_of_a_tensor_that_cannot_be_read_is_refused(values: torch.Tensor, kind: str) -> None:
    """The gradient of an embedding may be sparse; torch's own error says nothing about the call."""
    with pytest.raises(ArgumentTypeError, match=f"a histogram must be made of a dense tensor, not of {kind}"):
        histogram_of(values, 4)


@pytest.mark.parametrize("values", [["a"], [object()], "word"])
@pytest.mark.parametrize("has_numpy", [True, False])
def test_a_histogram_of_no_numbers_is_refused(values: object, has_numpy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_numpy:
        monkeypatch.delitem(sys.modules, "numpy")

    with pytest.raises(ArgumentTypeError, match=f"a histogram must be made of numbers, not {type(values).__name__}"):
        histogram_of(values, 4)
