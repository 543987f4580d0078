"""Plugins: found by name, registration, entry point and import path; what is wrong with one is said clearly."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import traceml
from tests.eventually import eventually
from tests.ports import free_port
from tests.recorder.conftest import environ
from tests.track.conftest import finish
from traceml import (
    BackendInterface,
    BackendPlugin,
    CollectorInterface,
    CollectorPlugin,
    FrameworkPlugin,
    PluginMetadata,
)
from traceml.errors import PluginError
from traceml.settings import Config
from traceml.track.backends.jsonl import JsonlBackend
from traceml.track.plugins import plugin_registry
from traceml.track.plugins.plugin_metadata import PluginType
from traceml.track.plugins.plugin_registry import create_backend, load
from traceml.track.rank.announcement import announcement
from traceml.track.tracker_state import DeliveryPhase, states_of

EXAMPLES = Path(__file__).parents[3] / "examples" / "plugins"


class Mine(BackendPlugin):
    """A backend of this module."""

    @classmethod
    def get_metadata(cls) -> PluginMetadata:
        return PluginMetadata(name="mine", version="1", options={"path": str, "much": (int, float)})

    def create_backend(self, config: Mapping[str, Any]) -> BackendInterface:
        return JsonlBackend(config)


class HalfBackend(BackendInterface):
    """A backend that lacks methods."""

    def start_experiment(self, name: str, project: str) -> str:
        raise NotImplementedError


class Bare(JsonlBackend):
    """A backend without a plugin."""


class OtherMetadata(JsonlBackend):
    """A backend whose `metadata` means something else."""

    metadata = {"owner": "team"}  # type: ignore[assignment]  # noqa: RUF012


class OldMetadata(Mine):
    """A plugin that describes itself by an object of its own, with some of the fields."""

    @classmethod
    def get_metadata(cls) -> Any:
        return SimpleNamespace(name="old", version="1", description="", dependencies=())


class Remote(JsonlBackend):
    """A backend that is not on this machine."""

    @property
    def is_local(self) -> bool:
        return False


class Incomplete(BackendPlugin):
    """A plugin that forgot something."""

    @classmethod
    def get_metadata(cls) -> PluginMetadata:
        return PluginMetadata(name="incomplete", version="1")


class Needy(Mine):
    """A plugin whose library is not there."""

    @classmethod
    def get_metadata(cls) -> PluginMetadata:
        return PluginMetadata(
            name="needy", version="1", dependencies=("json", "not_a_module_of_anyones"), extra="needy"
        )


class Reading(CollectorInterface):
    """A collector that wants no configuration."""

    def collect(self) -> list[Any]:
        return []


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    before = {kind: dict(names) for kind, names in plugin_registry._registered.items()}
    yield
    plugin_registry._registered.update(before)


def _config(tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {"options": {}, "run_id": "r", "run_dir": str(tmp_path), "experiment": {"id": "e"}, **more}


def test_a_registered_plugin_is_found_by_name(tmp_path: Path) -> None:
    """`register` takes a class, gives it back, and other processes learn its import path."""
    assert traceml.register(Mine) is Mine
    assert traceml.register(Mine) is Mine  # a module that is imported twice does no harm

    assert isinstance(create_backend("mine", _config(tmp_path)), JsonlBackend)
    assert plugin_registry.registered(PluginType.BACKEND) == {"mine": f"{__name__}:Mine"}
    plugin_registry._registered[PluginType.BACKEND].clear()
    assert isinstance(load(PluginType.BACKEND, "mine", known={"mine": f"{__name__}:Mine"}), Mine)


def test_import_paths_name_plugins_and_bare_classes(tmp_path: Path) -> None:
    """A class that implements an interface is as good as a plugin."""
    assert isinstance(create_backend(f"{__name__}:Mine", _config(tmp_path)), JsonlBackend)
    assert isinstance(create_backend(f"{__name__}:Bare", _config(tmp_path)), Bare)
    assert isinstance(create_backend(f"{__name__}:OtherMetadata", _config(tmp_path)), OtherMetadata)
    assert isinstance(create_backend(f"{__name__}:OldMetadata", _config(tmp_path)), JsonlBackend)
    collector = load(PluginType.COLLECTOR, f"{__name__}:Reading")
    assert isinstance(collector, CollectorPlugin)
    assert isinstance(collector.create_collector({}), Reading)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mlfow", "there is no tracker 'mlfow'. Did you mean 'mlflow'"),
        ("nothing_like_it", "Available: .*jsonl.*package:Class"),
        ("no_such_module:Thing", "^no_such_module:Thing cannot be loaded: ModuleNotFoundError"),
        (f"{__name__}:Nothing", "AttributeError"),
        (f"{__name__}:EXAMPLES", "must be a BackendPlugin or a BackendInterface"),
        (f"{__name__}:Reading", "must be a BackendPlugin or a BackendInterface"),
        (f"{__name__}:Incomplete", "does not define create_backend"),
        (
            f"{__name__}:HalfBackend",
            "cannot be used as BackendInterface: it does not define end_experiment, log_artifact",
        ),
    ],
)
def test_what_cannot_be_loaded_is_said(name: str, words: str) -> None:
    """The error names what was asked for, and what there is."""
    with pytest.raises(PluginError, match=words):
        load(PluginType.BACKEND, name)


class Plain(CollectorPlugin):
    """Declares its metadata in a method of instances, as any other method."""

    def get_metadata(self) -> PluginMetadata:  # type: ignore[override]
        return PluginMetadata(name="plain", version="1.0")

    def create_collector(self, config: Mapping[str, Any]) -> CollectorInterface:
        raise NotImplementedError


def test_an_instance_and_a_method_for_the_metadata_are_accepted() -> None:
    plugin = Plain()

    assert traceml.register(plugin) is plugin
    assert isinstance(load(PluginType.COLLECTOR, "plain"), Plain)
    assert Plain.get_metadata().name == plugin.get_metadata().name == "plain"  # type: ignore[call-arg]

    plugin.path = "here"  # type: ignore[attr-defined]
    with pytest.raises(PluginError, match=r"attributes of its own \(path\).*: register the class Plain"):
        traceml.register(plugin)


def test_registering_nonsense_is_refused() -> None:
    """No plugin, a taken name, and a class that can be neither imported nor sent."""

    class Local(Mine):
        lock = threading.Lock()

    class Taken(JsonlBackend):
        metadata = JsonlBackend.metadata

    with pytest.raises(PluginError, match="is not a plugin"):
        traceml.register(Bare)
    with pytest.raises(PluginError, match=r"cannot pickle '_thread.lock' object. Move the class into a module"):
        traceml.register(Local)

    Taken.__qualname__ = "Taken"
    with pytest.raises(PluginError, match="'jsonl' is already registered"):
        traceml.register(Taken)


OWN_BACKENDS = """
import traceml


class Lines(traceml.BackendInterface):
    metadata = traceml.PluginMetadata(name="lines", version="1")

    def start_experiment(self, name, project):
        return name

    def log_metric(self, name, value, step):
        write(self.metadata.name, f"{name} {step} {value}")

    def log_params(self, params):
        pass

    def log_artifact(self, artifact_path, artifact_name=None):
        pass

    def end_experiment(self):
        write(self.metadata.name, "end")


def make():
    class Others(Lines):
        metadata = traceml.PluginMetadata(name="others", version="1")

    return Others


traceml.register(Lines)
traceml.register(make())


def write(name, line):
    with open(name, "a") as file:
        file.write(line + "\\n")


write("runs", "again")
with traceml.Experiment("own", backend=["lines", "others"]):
    traceml.log_metric("x", 0.5, step=3)
traceml.flush()
"""


@pytest.mark.process
@pytest.mark.parametrize("words", [["-c", OWN_BACKENDS], ["own.py"]])
def test_backends_of_the_script_itself_are_sent(tmp_path: Path, words: list[str]) -> None:
    """Also of a notebook, which has no file, and of a function; with what they use, and without a second run."""
    (tmp_path / "own.py").write_text(OWN_BACKENDS)
    finish(
        subprocess.Popen([sys.executable, *words], env=environ(tmp_path, TRACEML_PORT=str(free_port())), cwd=tmp_path)
    )

    for name in ("lines", "others"):
        eventually(lambda name=name: "x 3 0.5\nend\n" in (tmp_path / name).read_text())
    assert (tmp_path / "runs").read_text() == "again\n"


def test_classes_of_one_function_are_not_confused() -> None:
    """Each is sent under its own name, though they have one import path."""

    def make(own: str) -> type:
        class Own(JsonlBackend):
            metadata = PluginMetadata(name=own, version="1")

        return Own

    names = ("left", "right")
    for name in names:
        traceml.register(make(name))

    sent = plugin_registry.sent_backends(names)
    assert [plugin_registry._unpickle(sent[name], name).metadata.name for name in names] == [*names]


def test_only_a_class_that_is_used_and_small_is_sent(caplog: pytest.LogCaptureFixture) -> None:
    """What is registered at the top of a script may read globals that grow; pickling ends at the limit."""
    pickled, data = [], [b""]

    class Part:
        def __reduce__(self) -> Any:
            pickled.append(1)
            return bytes, (bytes(1 << 16),)

    class Own(JsonlBackend):
        metadata = PluginMetadata(name="own", version="1")

        def held(self) -> list[Any]:
            return data

    traceml.register(Own)
    data[:] = [Part() for _ in range(1000)]

    assert "own" not in plugin_registry.sent_backends(["jsonl"])
    assert pickled == []
    assert "own" not in plugin_registry.sent_backends(["own"])
    assert 10 < len(pickled) < 40
    assert "has more than 1 MiB. Move the class into a module" in caplog.text


def test_a_class_that_nobody_can_sign_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At the start, where it can still be mended: its delivery will refuse it. Once, and only where one is sent."""
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    class Unsigned(JsonlBackend):
        metadata = PluginMetadata(name="unsigned", version="1")

    traceml.register(Unsigned)
    for backends in (["jsonl"], ["unsigned"], ["unsigned"]):
        announcement(Config(), backends, {})

    (record,) = caplog.records
    assert "nothing is delivered to unsigned: its class is defined in the script, and no key" in record.getMessage()
    assert str(tmp_path / "cache") in record.getMessage()


def test_options_are_checked(tmp_path: Path) -> None:
    """An unknown option and a wrong type are errors that name what is allowed."""
    with pytest.raises(PluginError, match="no option 'pth'; there are: much, path"):
        create_backend(f"{__name__}:Mine", _config(tmp_path, options={"pth": "x"}))
    with pytest.raises(PluginError, match="it must be int or float"):
        create_backend(f"{__name__}:Mine", _config(tmp_path, options={"much": "x"}))

    create_backend(f"{__name__}:Mine", _config(tmp_path, options={"path": str(tmp_path), "much": 3}))


def test_a_missing_library_is_said_with_its_extra(tmp_path: Path) -> None:
    """The error has the command that installs it, and nothing is imported to find out."""
    with pytest.raises(ImportError, match=r"needy needs not_a_module_of_anyones.*pip install 'traceml-torch\[needy\]'"):
        create_backend(f"{__name__}:Needy", _config(tmp_path))

    assert JsonlBackend.metadata.missing() is None


def test_local_only_refuses_what_does_not_say_that_it_is_local(tmp_path: Path) -> None:
    """A third party's backend counts as remote unless it says otherwise."""
    create_backend(f"{__name__}:Bare", _config(tmp_path, local_only=True))
    with pytest.raises(PluginError, match="not on this machine"):
        create_backend(f"{__name__}:Remote", _config(tmp_path, local_only=True))


@pytest.mark.process
def test_plugin_classes_cost_the_training_process_little() -> None:
    """The base classes bring in nothing but the standard library."""
    code = "import sys, traceml; traceml.BackendPlugin, traceml.register, traceml.Metric; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )

    assert not {"importlib.metadata", "numpy", "pydantic", "mlflow", "wandb", "sqlite3"} & loaded


TRAINING = """
import sys, time
import traceml
from tqdm import tqdm

traceml.init(
    local=True, runs_dir=sys.argv[1], backend=["csv", "traceml_example.csv_backend:CsvBackend"],
    collectors=["load"], frameworks=["tqdm"], track_git=False, track_env=False, track_system=False,
    backend_options={"csv": {"folder": sys.argv[1] + "/out"}},
)
original, route = tqdm.set_postfix, traceml.Orchestrator.route_metric
names = []

def noted(orchestrator, metric):
    names.append(metric.name)
    route(orchestrator, metric)

traceml.Orchestrator.route_metric = noted
with traceml.Experiment("example") as experiment:
    bar = tqdm(range(50), file=sys.stderr)
    for step in bar:
        bar.set_postfix(loss=step / 7, phase="train")
        traceml.log_metric("own", step * 2, step=step)

    until = time.monotonic() + 120
    while names.count("load/1min") < 2 and time.monotonic() < until:
        time.sleep(0.01)

traceml.shutdown()
print("unpatched" if tqdm.set_postfix is not original else "still patched")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the example package, as a user would, into a folder of its own and without a network."""
    folder = tmp_path_factory.mktemp("plugins")
    shutil.copytree(EXAMPLES, folder / "source")  # building leaves files beside the sources
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    pip += ["--no-build-isolation", "--no-deps", "--target", str(folder / "site"), str(folder / "source")]
    subprocess.run(pip, check=True)
    return folder / "site"


@pytest.mark.process
def test_a_third_partys_package_is_found_and_used(installed: Path, tmp_path: Path) -> None:
    """A backend, a collector and a framework of an installed package work by their names alone."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])}
    for name in [name for name in environment if name.startswith("TRACEML_")]:
        del environment[name]

    environment["TRACEML_PORT"] = str(free_port())
    command = [sys.executable, "-c", TRAINING, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "unpatched"

    (run,) = [store.parent for store in tmp_path.glob("2*/store.db")]

    def is_delivered() -> bool:
        states = states_of(run)
        return len(states) == 2 and all(state.phase is DeliveryPhase.DONE for state in states)

    eventually(is_delivered)

    for folder in (tmp_path / "out", run):
        rows = [row for path in folder.glob("*.csv") for row in csv.DictReader(path.read_text().splitlines())]
        assert [(int(row["step"]), float(row["value"])) for row in rows if row["name"] == "own"] == [
            (step, step * 2.0) for step in range(50)
        ]
        assert [(int(row["step"]), float(row["value"])) for row in rows if row["name"] == "loss"] == [
            (step, step / 7) for step in range(50)
        ]
        assert len([row for row in rows if row["name"] == "load/1min"]) >= 2


def test_framework_plugins_patch_once() -> None:
    """Patching twice is patching once; unpatching twice does no harm."""
    calls: list[str] = []

    class Recording(traceml.FrameworkInterface):
        def patch(self, orchestrator: Any) -> None:
            calls.append("patch")

        def unpatch(self) -> None:
            calls.append("unpatch")

    class Plugin(FrameworkPlugin):
        @classmethod
        def get_metadata(cls) -> PluginMetadata:
            return PluginMetadata(name="recording", version="1")

        def create_framework(self) -> traceml.FrameworkInterface:
            return Recording()

    plugin = Plugin()
    orchestrator: Any = None
    for _ in range(2):
        plugin.patch_framework(orchestrator)
    for _ in range(2):
        plugin.unpatch_framework()

    assert calls == ["patch", "unpatch"]


def test_framework_plugins_may_patch_by_themselves() -> None:
    """The two methods of the interface are enough; a plugin with neither says what it lacks."""

    class Own(FrameworkPlugin):
        patched = False

        @classmethod
        def get_metadata(cls) -> PluginMetadata:
            return PluginMetadata(name="own", version="1")

        def patch_framework(self, orchestrator: Any) -> None:
            self.patched = True

        def unpatch_framework(self) -> None:
            self.patched = False

    class Neither(FrameworkPlugin):
        @classmethod
        def get_metadata(cls) -> PluginMetadata:
            return PluginMetadata(name="neither", version="1")

    orchestrator: Any = None
    plugin = Own()
    plugin.patch_framework(orchestrator)
    assert plugin.patched

    with pytest.raises(NotImplementedError, match=r"Neither cannot be used as FrameworkPlugin.*create_framework"):
        Neither().patch_framework(orchestrator)
