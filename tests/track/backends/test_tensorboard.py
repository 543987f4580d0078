"""TensorBoard event files, read back by TensorBoard: everything once, cut off where the mark says."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.track.backends.conftest import Maker
from traceml.track.plugins.metric import Metric

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def _read(folder: str | Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
    return accumulator.Reload()


def _steps(folder: str | Path, name: str) -> list[int]:
    return [each.step for each in _read(folder).Scalars(name)]


def _png() -> bytes:
    """Return a red picture, 3 wide and 2 high."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\xff\0\0" * 3) * 2
    head = struct.pack(">IIBBBBB", 3, 2, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_everything_is_read_back(make: Maker, tmp_path: Path) -> None:
    """Values (as float32), steps, times, texts, images, histograms and parameters are what was given."""
    from tensorboard.util.tensor_util import make_ndarray

    image = tmp_path / "red.png"
    image.write_bytes(_png())
    backend = make("tensorboard", log_dir=str(tmp_path / "tb"))

    folder = backend.start_experiment("first", "tests")
    backend.set_tags({"team": "ü"})
    values = [0.1, math.nan, math.inf, -math.inf, *(float(i) for i in range(20_000))]
    names = ["loss", "größe % [x]/y", "half \ud800"]
    backend.log_metrics([Metric(names[i % 3], value, 20_004 - i, 1.7e9 + i) for i, value in enumerate(values)])
    backend.log_params({"lr": 1e-3, "a": {"b": "x | y"}})
    backend.log_text("note", "zwei\nZeilen", 4)
    backend.log_histogram("h", [1, 2], [0.0, 0.5, 1.0], 5)
    backend.log_image("cat", image, 6)
    backend.log_artifact(str(image))
    backend.end_state("finished")
    backend.end_experiment()

    read = _read(folder)
    got = [read.Scalars(name) for name in read.Tags()["scalars"]]
    assert len(got) == 3
    by_time = sorted((each.wall_time, each.step, each.value) for part in got for each in part)
    assert [step for _, step, _ in by_time] == [20_004 - i for i in range(len(values))]
    expected = [struct.unpack("f", struct.pack("f", value))[0] for value in values]
    assert str([value for *_, value in by_time]) == str(expected)
    assert by_time[7][0] == 1.7e9 + 7
    texts = {tag: make_ndarray(read.Tensors(tag)[0].tensor_proto) for tag in read.Tags()["tensors"]}
    assert texts["note"].item() == b"zwei\nZeilen"
    assert texts["traceml/params"].item() == b"| name | value |\n|---|---|\n| lr | 0.001 |\n| a/b | x \\| y |"
    assert texts["traceml/tags"].item().decode().endswith("| team | ü |")
    assert json.loads(texts["artifacts/red.png"].item())["path"] == str(image)
    assert texts["h"].tolist() == [[0.0, 0.5, 1.0], [0.5, 1.0, 2.0]]
    (cat,) = read.Images("cat")
    assert (cat.encoded_image_string, cat.width, cat.height, cat.step) == (image.read_bytes(), 3, 2, 6)


def test_what_came_after_the_mark_is_cut_off(make: Maker) -> None:
    """A batch that was written and not noted comes once when it comes again."""
    first = make("tensorboard")
    folder = first.start_experiment("first", "tests")
    first.log_metrics([Metric("loss", float(i), i) for i in range(10)])
    mark = json.loads(json.dumps(first.mark()))
    again = [Metric("loss", float(i), i) for i in range(10, 20)]
    first.log_metrics(again)

    second = make("tensorboard")
    assert second.resume(mark)
    assert second.start_experiment("first", "tests") == folder
    second.log_metrics(again)

    assert _steps(folder, "loss") == list(range(20))


def test_a_start_without_a_mark_begins_anew(make: Maker) -> None:
    """Data of a delivery that recorded nothing is removed."""
    first = make("tensorboard")
    folder = first.start_experiment("first", "tests")
    first.log_metric("loss", 1.0, 1)
    second = make("tensorboard")
    second.start_experiment("first", "tests")
    second.log_metric("loss", 1.0, 1)

    assert _steps(folder, "loss") == [1]


def test_a_continued_run_gets_one_more_file(make: Maker) -> None:
    """Resuming an experiment goes on in its folder, and TensorBoard shows one run."""
    first = make("tensorboard")
    folder = first.start_experiment("first", "tests")
    first.log_metric("loss", 1.0, 1)
    first.end_experiment()
    second = make("tensorboard", continue_run=folder, experiment={"id": "exp-2"})
    assert second.start_experiment("first", "tests") == folder
    second.log_metric("loss", 2.0, 2)
    second.end_experiment()

    assert _steps(folder, "loss") == [1, 2]


def test_values_may_have_the_names_of_other_facts(make: Maker) -> None:
    """TensorBoard shows a tag by what came first under it: beside a table of that name, values were in no chart."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    backend = make("tensorboard")
    folder = backend.start_experiment("first", "tests")
    backend.set_tags({"team": "red"})
    backend.log_params({"lr": 0.1})
    names = {"run", "tags", "params", "state"}
    backend.log_metrics([Metric(name, 1.0, 1) for name in names])
    backend.end_state("finished")

    assert set(EventAccumulator(folder).Reload().PluginTagToContent("scalars")) == names


def test_values_after_the_end_erase_none_before(make: Maker) -> None:
    """An experiment that has ended is opened again by a late value: by the same id, so by the same name of a file."""
    mark, folder = None, None
    for step in range(3):
        backend = make("tensorboard", continue_run=folder, mark=mark)
        folder = backend.start_experiment("first", "tests")
        backend.log_metric("loss", 1.0, step)
        mark = json.loads(json.dumps(backend.mark()))
        backend.end_experiment()

    assert _steps(str(folder), "loss") == [0, 1, 2]
    assert len(list(Path(str(folder)).iterdir())) == 3


def test_a_lost_file_is_written_again(make: Maker) -> None:
    """From the run's first row: no new file may look complete that is not."""
    first = make("tensorboard")
    folder = Path(first.start_experiment("first", "tests"))
    mark = first.mark()
    (path,) = folder.iterdir()
    path.write_bytes(b"short")

    assert not make("tensorboard").resume(mark)

    path.unlink()
    assert not make("tensorboard").resume(mark)


FULL = """
import resource, signal, sys
from traceml.track.backends.tensorboard import TensorBoardBackend
from traceml.track.plugins.metric import Metric
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
backend = TensorBoardBackend({"run_dir": sys.argv[1], "experiment": {"id": "e"}})
backend.start_experiment("n", "p")
unlimited = resource.RLIM_INFINITY
resource.setrlimit(resource.RLIMIT_FSIZE, (backend.mark()["offset"] + 1000, unlimited))
rows = [Metric("loss", float(i), i) for i in range(50)]
failed = 0
try:
    backend.log_metrics(rows)
except OSError:
    failed = 1
resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
backend.log_metrics(rows)
backend.end_experiment()
print(failed)
"""


def test_a_full_disk_leaves_no_half_event(tmp_path: Path) -> None:
    """A batch that did not fit is taken back, and fits when there is room again."""
    ran = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, check=True)

    assert ran.stdout.split() == ["1"]
    (folder,) = (tmp_path / "tensorboard").iterdir()
    assert _steps(folder, "loss") == list(range(50))


def test_the_hparams_page_has_the_run(make: Maker, tmp_path: Path) -> None:
    """TensorBoard's own page shows parameters with their types, values, status and times; also after a restart."""
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    about = {"started": 1000.0, "name": "a / run"}
    first = make("tensorboard", log_dir=str(tmp_path / "tb"), experiment=about)
    folder = Path(first.start_experiment("a / run", "tests"))
    first.log_params({"lr": 0.25, "deep": {"on": True}})
    mark = json.loads(json.dumps(first.mark()))
    second = make("tensorboard", log_dir=str(tmp_path / "tb"), experiment=about, mark=mark)
    second.resume(mark)
    second.start_experiment("a / run", "tests")
    second.log_params({"lr": 0.5, "words": "x"})
    second.log_metric("loss", 0.125, 7)
    second.end_time(1060.0)
    second.end_state("failed")
    second.end_experiment()

    assert folder.name.startswith("a_run-")
    multiplexer = plugin_event_multiplexer.EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(tmp_path / "tb"))
    multiplexer.Reload()
    assert multiplexer.FirstEventTimestamp(folder.name) == 1000.0  # by which it sorts runs
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(tmp_path / "tb"))
    context = backend_context.Context(TBContext(data_provider=provider, logdir=str(tmp_path / "tb")))
    request = RequestContext()
    shown = context.experiment_from_metadata(
        request, "", True, context.hparams_metadata(request, ""), context.hparams_from_data_provider(request, "", None)
    )
    columns = [api_pb2.ColParams(metric=each.name) for each in shown.metric_infos]
    columns += [api_pb2.ColParams(hparam=each.name) for each in shown.hparam_infos]
    wanted = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=9, col_params=columns)
    wanted.allowed_statuses.extend([api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE])
    handler = list_session_groups.Handler(request, context, "", wanted)
    (group,) = handler.run().session_groups
    hparams = {name: getattr(value, str(value.WhichOneof("kind"))) for name, value in group.hparams.items()}
    assert hparams == {"lr": 0.5, "deep/on": True, "words": "x"}
    (session,) = group.sessions
    assert (session.start_time_secs, session.end_time_secs) == (1000.0, 1060.0)
    assert (session.status, [value.value for value in session.metric_values]) == (api_pb2.STATUS_FAILURE, [0.125])
