"""Readers of all that a tracker holds of a run, by its own means and in a fresh process where it needs one."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

from tests.forked import client as forked
from tests.track.backends.wandb_reader import history, records
from tests.track.readers import READERS, Value, trackio_run

__all__ = ["CONTENTS", "Contents", "color_of"]


@dataclass
class Contents:
    """What a tracker holds of one run.

    Attributes:
        metrics: sorted (name, step, value).
        texts: sorted (name, step, text).
        images: sorted (name, step, color of the first pixel).
        histograms: sorted (name, step, counts).
        artifacts: name -> newest content.
        params: name -> value, in the tracker's own form.
        facts: name -> value of what collectors read, where it is not among the parameters.
        system: fields that the tracker shows itself.
        times: sorted epoch seconds of the texts `note`, where the tracker has them.
        started, ended: epoch seconds of the training, where the tracker has them.
        tags: the tags that people filter by.
        state: how it ended, in the tracker's own word.
    """

    metrics: list[Value]
    texts: list[tuple[str, int, str]] = field(default_factory=list)
    images: list[tuple[str, int, tuple[int, ...]]] = field(default_factory=list)
    histograms: list[tuple[str, int, list[float]]] = field(default_factory=list)
    artifacts: dict[str, bytes] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    system: dict[str, Any] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    started: float | None = None
    ended: float | None = None
    state: str = ""

    def sorted(self) -> Contents:
        """Sort everything that has no order of its own."""
        for part in (self.metrics, self.texts, self.images, self.histograms, self.tags, self.times):
            part.sort()

        return self


def color_of(content: bytes | Path) -> tuple[int, ...]:
    """Return the first pixel of an image."""
    from PIL import Image

    with Image.open(content if isinstance(content, Path) else BytesIO(content)) as image:
        pixel = image.convert("RGB").getpixel((0, 0))

    assert isinstance(pixel, tuple)
    return pixel


def jsonl(run_dir: Path, number: str) -> Contents:
    """Read the lines."""
    found = Contents(READERS["jsonl"](run_dir, number))
    tags: dict[str, str] = {}
    for row in map(json.loads, Path(number).read_text().splitlines()):
        kind = row["type"]
        if kind == "text":
            found.texts.append((row["name"], row["step"], row["text"]))
            found.times += [row["timestamp"]] * (row["name"] == "note")
        elif kind == "image":
            found.images.append((row["name"], row["step"], color_of(Path(row["path"]))))
        elif kind == "histogram":
            found.histograms.append((row["name"], row["step"], row["counts"]))
        elif kind == "artifact":
            found.artifacts[row["name"]] = Path(row["path"]).read_bytes()
        elif kind == "params":
            found.params |= row["params"]
        elif kind == "facts":
            found.facts |= row["facts"]
        elif kind == "tags":
            tags |= row["tags"]
        elif kind == "end":
            found.state, found.ended = row["state"], row["timestamp"]

        if kind == "start":
            found.started = row["timestamp"]

    found.tags = [f"{key}: {value}" for key, value in tags.items()]
    return found.sorted()


def mlflow(run_dir: Path, number: str) -> Contents:
    """Ask the store, and read the artifacts."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run_dir.parent}/mlflow.db")
    run = client.get_run(number)
    found = Contents(READERS["mlflow"](run_dir, number), params=dict(run.data.params), state=run.info.status)
    found.started, found.ended = run.info.start_time / 1000, run.info.end_time / 1000
    for key, value in run.data.tags.items():
        if key.startswith("mlflow."):
            found.system[key] = value
        elif not key.startswith("traceml."):
            found.tags.append(f"{key}: {value}")

    root = Path(str(run.info.artifact_uri).removeprefix("file://"))
    for path in (each for each in sorted(root.rglob("*")) if each.is_file()):
        kind, _, rest = path.relative_to(root).as_posix().partition("/")
        name = rest.rpartition("/")[0]
        if kind == "text":
            found.texts.append((name, int(path.stem.partition("-")[0]), path.read_text()))
        elif kind == "images":
            found.images.append((name, int(path.stem.partition("-")[0]), color_of(path)))
        elif kind == "histograms":
            found.histograms.append((name, int(path.stem.partition("-")[0]), json.loads(path.read_text())["counts"]))
        else:
            found.artifacts[path.relative_to(root).as_posix()] = path.read_bytes()

    return found.sorted()


def tensorboard(run_dir: Path, number: str) -> Contents:
    """Read with TensorBoard's own accumulator."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from tensorboard.util.tensor_util import make_ndarray

    tags: dict[str, str] = {}
    found = Contents(READERS["tensorboard"](run_dir, number))
    read = EventAccumulator(number, size_guidance={"tensors": 0, "images": 0}).Reload()
    plugin = read.PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(plugin["_hparams_/session_start_info"]).session_start_info
    end = HParamsPluginData.FromString(plugin["_hparams_/session_end_info"]).session_end_info
    found.started, found.ended = start.start_time_secs, end.end_time_secs
    found.params = {name: getattr(value, str(value.WhichOneof("kind"))) for name, value in start.hparams.items()}
    found.system = {"folder": Path(number).name, "status": end.status}
    for name in read.Tags()["images"]:
        found.images += [(name, each.step, color_of(each.encoded_image_string)) for each in read.Images(name)]

    for name in read.Tags()["tensors"]:
        for each in read.Tensors(name):
            value = make_ndarray(each.tensor_proto)
            if name.startswith("_hparams_/"):
                continue
            if value.ndim:
                found.histograms.append((name, each.step, value[:, 2].tolist()))
            elif name == "traceml/tags":
                tags |= _rows(value.item().decode())
            elif name.startswith("facts/"):
                found.facts |= _rows(value.item().decode())
            elif name in {"traceml/params", "traceml/run"}:
                continue
            elif name.startswith("artifacts/"):
                found.artifacts[name[10:]] = Path(json.loads(value.item())["path"]).read_bytes()
            elif name == "traceml/state":
                found.state = value.item().decode()
            else:
                found.texts.append((name, each.step, value.item().decode()))
                found.times += [each.wall_time] * (name == "note")

    found.tags = [f"{key}: {value}" for key, value in tags.items()]
    return found.sorted()


def _rows(table: str) -> dict[str, str]:
    """Return the rows of a Markdown table of two columns."""
    return {name: value for _, name, value, _ in (map(str.strip, line.split("|")) for line in table.splitlines()[2:])}


def wandb(run_dir: Path, number: str) -> Contents:
    """Read the one offline run there is of that id."""
    (folder,) = run_dir.glob(f"wandb/offline-run-*-{number}")
    found = Contents(READERS["wandb"](run_dir, number))
    rows = history(folder)
    media = {name.rpartition(".")[0] for row in rows for name in row if name.endswith("._type")}
    found.metrics = [value for value in found.metrics if value[0].rpartition(".")[0] not in media]
    for row in rows:
        for name, value in row.items():
            step = row["traceml/step"]
            if name.endswith(".path"):
                found.images.append((name.removesuffix(".path"), step, color_of(folder / "files" / value)))
            elif name.endswith(".values"):
                found.histograms.append((name.removesuffix(".values"), step, value))
            elif isinstance(value, str) and not name.startswith("_") and "." not in name:
                found.texts.append((name, step, value))
                found.times += [row["_timestamp"]] * (name == "note")

    for record in records(folder):
        kind = record.WhichOneof("record_type")
        if kind == "config":
            found.params |= {item.key: json.loads(item.value_json) for item in record.config.update if item.key}
        elif kind == "run":
            found.tags = list(record.run.tags)
        elif kind == "exit":
            found.state = str(record.exit.exit_code)
        elif kind in {"request", "artifact"}:
            artifact = record.request.log_artifact.artifact if kind == "request" else record.artifact
            for entry in artifact.manifest.contents:
                found.artifacts[json.loads(artifact.metadata)["name"]] = Path(entry.local_path).read_bytes()

    return found.sorted()


def clearml(run_dir: Path, number: str) -> Contents:
    """Read the packed session, the file that an import takes."""
    found = Contents(READERS["clearml"](run_dir, number))
    with zipfile.ZipFile(run_dir / "clearml" / "offline" / f"{number}.zip") as packed:
        task = json.loads(packed.read("task.json"))
        files = {name: packed.read(name) for name in packed.namelist()}

    for line in files["metrics.jsonl"].decode().splitlines():
        for event in json.loads(line):
            name = _joined(event.get("metric", ""), event.get("variant", ""))
            if event["type"] == "log":
                about, _, text = event["msg"].partition("]: ")
                found.texts.append((about.rpartition(" [")[0], int(about.rpartition(" [")[2]), text))
                found.times += [event["timestamp"] / 1000] * about.startswith("note [")
            elif event["type"] == "training_debug_image":
                found.images.append((name, event["iter"], color_of(files[f"data/{event['key']}"])))
            elif event["type"] == "plot":
                found.histograms.append((name, event["iter"], json.loads(event["plot_str"])["data"][0]["y"]))

    for section, params in task["hyperparams"].items():
        prefix = "" if section == "General" else f"{section}/"
        found.params |= {f"{prefix}{name}": (each["type"], each["value"]) for name, each in params.items()}

    for each in task["execution"]["artifacts"]:
        found.artifacts[each["key"]] = files[next(name for name in files if name.endswith(_uri_end(each["uri"])))]

    found.tags, found.state = task["tags"], task["status"]
    return found.sorted()


def _joined(title: str, series: str) -> str:
    return title if title == series else f"{title}/{series}"


def _uri_end(uri: str) -> str:
    return "/".join(uri.rsplit("/", 2)[-2:])


_AIM = """
import json, sys
import aim
run = aim.Repo(sys.argv[1]).get_run(sys.argv[2])
out = {"note_times": [], "texts": [], "images": [], "histograms": [], "artifacts": {}}
kinds = {"texts": "text", "images": "image", "histograms": "distribution"}
for part, kind in kinds.items():
    for name, context, _ in run.iter_sequence_info_by_type(f"aim.{kind}"):
        for step, (value, _, time) in getattr(run, f"get_{kind}_sequence")(name, context).data.items():
            if kind == "text":
                shown = value.data
                out["note_times"] += [time] * (name == "note")
            elif kind == "image":
                shown = value.to_pil_image().convert("RGB").getpixel((0, 0))
            else:
                shown = value.weights.tolist()
            out[part].append([name, step, shown])
for name, artifact in run.artifacts.items():
    out["artifacts"][name] = artifact.uri if hasattr(artifact, "uri") else artifact["uri"]
out["params"] = run["hparams"] if run.get("hparams") else {}
out["tags"], out["state"] = list(run.tags), run.get("state")
out["facts"] = {name: run.get(name) for name in ("git", "system")}
out["times"] = run.creation_time, run.end_time
print(json.dumps(out, default=str))
"""


def aim(run_dir: Path, number: str) -> Contents:
    """Read in a fresh process, as a user would."""
    command = [sys.executable, "-c", _AIM, str(run_dir.parent), number]
    done = forked.run(command, imports="aim", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    read = json.loads(done.stdout.splitlines()[-1])
    return Contents(
        READERS["aim"](run_dir, number),
        texts=[(name, step, text) for name, step, text in read["texts"]],
        images=[(name, step, tuple(pixel)) for name, step, pixel in read["images"]],
        histograms=[(name, step, counts) for name, step, counts in read["histograms"]],
        artifacts={name: Path(uri.removeprefix("file://")).read_bytes() for name, uri in read["artifacts"].items()},
        params=read["params"],
        tags=read["tags"],
        facts=read["facts"],
        times=read["note_times"],
        started=read["times"][0],
        ended=read["times"][1],
        state=read["state"],
    ).sorted()


def trackio(run_dir: Path, number: str) -> Contents:
    """Read in a fresh process, and the files of media and artifacts."""
    read = trackio_run(run_dir, number)
    folder, config = run_dir.parent / "trackio", read["config"]
    found = Contents(READERS["trackio"](run_dir, number), state=config["traceml/state"])
    found.started = datetime.fromisoformat(config["_Created"]).timestamp()
    found.ended = datetime.fromisoformat(config["traceml/ended"]).timestamp()
    found.system = {name: config[name] for name in ("_Username", "_Group")}
    for row in read["logs"]:
        for name, value in ((name, value) for name, value in row.items() if isinstance(value, dict)):
            if value["_type"] == "trackio.markdown":
                found.texts.append((name, row["step"], value["_value"]))
                found.times += [datetime.fromisoformat(row["timestamp"]).timestamp()] * (name == "note")
            elif value["_type"] == "trackio.histogram":
                found.histograms.append((name, row["step"], value["values"]))
            elif value["_type"] == "trackio.image":
                found.images.append((name, row["step"], color_of(folder / "media" / value["file_path"])))

    for artifact in sorted(read["artifacts"], key=lambda each: each["version"]):
        (entry,) = artifact["manifest"]
        blob = folder / "artifacts" / "tests" / "blobs/sha256" / entry["digest"][:2] / entry["digest"]
        found.artifacts[artifact["metadata"]["name"]] = blob.read_bytes()

    for name, value in config.items():
        if name.startswith("tags/"):
            found.tags.append(f"{name[5:]}: {value}")
        else:
            found.params[name] = value

    return found.sorted()


CONTENTS: dict[str, Callable[[Path, str], Contents]] = {
    "aim": aim,
    "clearml": clearml,
    "jsonl": jsonl,
    "mlflow": mlflow,
    "tensorboard": tensorboard,
    "trackio": trackio,
    "wandb": wandb,
}
