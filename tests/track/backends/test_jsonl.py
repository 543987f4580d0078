"""The file of lines: exact after a crash at any moment, strict JSON, nothing half written."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.track.backends.conftest import Maker
from traceml.errors import BackendError
from traceml.track.backends.jsonl import JsonlBackend
from traceml.track.plugins.metric import Metric


def _lines(path: str | Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> Any:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in Path(path).read_bytes().splitlines()]


def test_everything_is_a_line(make: Maker, tmp_path: Path) -> None:
    """Each kind of row is one line that says all there is to say."""
    body = tmp_path / "weights.bin"
    body.write_bytes(b"w" * 1000)
    backend = make("jsonl", path=str(tmp_path / "out"))

    path = backend.start_experiment("first", "tests")
    rows = [
        Metric("loss", 0.1 + 0.2, 3, 1.25, rank=1),
        *(Metric("x", v, 0, 2.0) for v in (math.nan, math.inf, -math.inf)),
    ]
    backend.log_metrics(rows)
    backend.log_params({"lr": 1e-3, "deep": {"a": [1, math.nan]}})
    backend.set_tags({"k": "v"})
    backend.log_text("note", "zwei\nZeilen \ud800", 4)
    backend.log_histogram("h", [1, 2], [0.0, 0.5, 1.0], 5)
    backend.log_artifact(str(body), "../up/weights.bin")
    backend.end_state("finished")
    backend.end_experiment()

    lines = _lines(path)
    assert lines[6] == {"type": "tags", "tags": {"k": "v"}}
    assert lines[1] == {
        "type": "metric",
        "name": "loss",
        "value": 0.30000000000000004,
        "step": 3,
        "timestamp": 1.25,
        "rank": 1,
    }
    assert [line["value"] for line in lines[2:5]] == ["NaN", "Infinity", "-Infinity"]
    assert lines[5] == {"type": "params", "params": {"lr": 1e-3, "deep": {"a": [1, "NaN"]}}}
    assert lines[7]["text"].startswith("zwei\nZeilen")
    assert Path(lines[9]["path"]).read_bytes() == body.read_bytes()
    assert Path(lines[9]["path"]).is_relative_to(tmp_path / "out")
    assert lines[10]["state"] == "finished"


def test_what_came_after_the_mark_is_cut_off(make: Maker) -> None:
    """A batch that was written and not noted comes once when it comes again."""
    first = make("jsonl")
    path = first.start_experiment("first", "tests")
    first.log_metrics([Metric("loss", float(i), i) for i in range(10)])
    first.flush()
    mark = json.loads(json.dumps(first.mark()))
    again = [Metric("loss", float(i), i) for i in range(10, 20)]
    first.log_metrics(again)

    second = make("jsonl")
    second.resume(mark)
    assert second.start_experiment("first", "tests") == path
    second.log_metrics(again)
    second.end_experiment()

    assert [line["step"] for line in _lines(path) if line["type"] == "metric"] == list(range(20))


def test_a_start_without_a_mark_begins_anew(make: Maker) -> None:
    """Data of a delivery that recorded nothing is removed."""
    first = make("jsonl")
    path = first.start_experiment("first", "tests")
    first.log_metrics([Metric("loss", 1.0, 1)])

    second = make("jsonl")
    second.start_experiment("first", "tests")
    second.log_metrics([Metric("loss", 1.0, 1)])

    assert [line["type"] for line in _lines(path)] == ["start", "metric"]


def test_a_continued_run_keeps_what_it_has(make: Maker) -> None:
    """Resuming an experiment appends to its file."""
    first = make("jsonl")
    path = first.start_experiment("first", "tests")
    first.log_metrics([Metric("loss", 1.0, 1)])
    first.end_experiment()

    second = make("jsonl", continue_run=path, experiment={"id": "exp-2"})
    assert second.start_experiment("first", "tests") == path
    second.log_metrics([Metric("loss", 2.0, 2)])
    second.end_experiment()

    assert [line.get("value") for line in _lines(path)] == [None, 1.0, 2.0]


def test_a_lost_file_is_written_again(make: Maker) -> None:
    """From the run's first row: no new file may look complete that is not."""
    first = make("jsonl")
    path = Path(first.start_experiment("first", "tests"))
    first.log_metrics([Metric("loss", 1.0, 1)])
    mark = first.mark()
    path.unlink()

    assert not make("jsonl").resume(mark)

    path.write_bytes(b"short")
    again = make("jsonl")
    assert not again.resume(mark)
    again.start_experiment("first", "tests")
    assert again.mark()["path"] == str(path)
    assert [line["type"] for line in _lines(path)] == ["start"]


def test_a_lost_file_of_an_earlier_run_is_said(make: Maker, tmp_path: Path) -> None:
    """Its rows are not in this run's store."""
    first = make("jsonl", continue_run=str(tmp_path / "earlier.jsonl"))
    path = Path(first.start_experiment("first", "tests"))
    mark = first.mark()
    path.unlink()

    with pytest.raises(BackendError, match="is gone"):
        make("jsonl", continue_run=str(path)).resume(mark)


FULL = """
import resource, signal, sys
from traceml.track.backends.jsonl import JsonlBackend
from traceml.track.plugins.metric import Metric
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
backend = JsonlBackend({"run_dir": sys.argv[1], "experiment": {"id": "e"}})
backend.start_experiment("n", "p")
batches = [[Metric("loss", float(i), i) for i in range(k * 50, k * 50 + 50)] for k in range(8)]
backend.log_metrics(batches[0])
resource.setrlimit(resource.RLIMIT_FSIZE, (backend.mark()["offset"] + 1000, resource.RLIM_INFINITY))
failed = 0
for batch in batches[1:]:
    try:
        backend.log_metrics(batch)
    except OSError:
        failed += 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        backend.log_metrics(batch)
backend.end_experiment()
print(failed)
"""


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    """A batch that did not fit is taken back, and fits when there is room again."""
    ran = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, check=True)

    assert ran.stdout.split() == ["1"]
    lines = _lines(tmp_path / "jsonl" / "e.jsonl")
    assert [line["step"] for line in lines[1:]] == list(range(400))


def test_a_file_that_was_moved_with_its_run_is_continued(tmp_path: Path) -> None:
    """After its last confirmed line, where the run's folder is now; a file that is nowhere is written again."""
    before, after = tmp_path / "before", tmp_path / "after"
    config = {"experiment": {"id": "one"}, "options": {}}
    backend = JsonlBackend({**config, "run_dir": str(before)})
    backend.start_experiment("one", "tests")
    backend.log_metric("loss", 1.0, 0)
    mark = backend.mark()
    backend.log_metric("loss", 2.0, 1)  # not confirmed
    before.rename(after)

    again = JsonlBackend({**config, "run_dir": str(after)})
    again.resume(mark)
    again.start_experiment("one", "tests")
    again.log_metric("loss", 3.0, 1)

    assert [line["value"] for line in _lines(after / "jsonl" / "one.jsonl")[1:]] == [1.0, 3.0]
    assert again.mark()["path"] == str(after / "jsonl" / "one.jsonl")
    assert not JsonlBackend({**config, "run_dir": str(tmp_path / "elsewhere")}).resume(mark)


def test_copies_of_one_name_stay_apart(make: Maker, tmp_path: Path) -> None:
    """Another image of a name and step replaced the first; an artifact named as a folder of images stopped delivery."""
    images = [tmp_path / f"{digest * 16}.png" for digest in ("aaaa", "bbbb")]
    for image in images:
        image.write_bytes(image.name.encode())

    backend = make("jsonl", path=str(tmp_path / "out"))
    path = backend.start_experiment("first", "tests")
    for image in (*images, *images):
        backend.log_image("cat", image, 1)

    backend.log_artifact(str(images[1]), "cat")
    backend.log_artifact(str(images[0]), "cat/1.png/x")

    stored = [Path(line["path"]).read_bytes() for line in _lines(path)[1:]]
    assert stored == [each.name.encode() for each in (*images, *images, images[1], images[0])]


def test_names_of_any_length_are_files(make: Maker, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"png")
    backend = make("jsonl", path=str(tmp_path / "out"))
    path = backend.start_experiment("first", "tests")
    for name in ("日" * 100, "日" * 101, "n" * 3000):
        backend.log_image(name, tmp_path / "image.png", 1)

    assert len({line["path"] for line in _lines(path)[1:]}) == 3
