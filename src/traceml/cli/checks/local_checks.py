"""Checks of `traceml doctor`. Each one returns its result, and does not raise for a problem."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from traceml.database.store.filesystem import network_filesystem
from traceml.errors import (
    AggregatorForeignError,
    AggregatorRefusedError,
    AggregatorUnavailableError,
    PluginError,
    SettingsError,
)
from traceml.formatting import bytes_text, left_text, plural
from traceml.installation import PACKAGE, foreign_distributions, foreign_hint, free_threading_limits, install_command
from traceml.privacy import secrets_only
from traceml.process_ends import end_of_status
from traceml.settings import Config, declarations, load
from traceml.track.plugins.plugin_metadata import PluginType
from traceml.track.plugins.plugin_registry import check_name
from traceml.track.rank.announcement import check_backend
from traceml.version import __version__

__all__ = ["Check", "Setting", "all_checks", "setting_values"]

State = Literal["ok", "note", "broken"]

# A 65,536-row ring and the other rings take about 10 MiB per rank; a rank takes at most 1/16 of the free space.
_FLIGHT_FREE_BYTES = 160 << 20
_RUNS_FREE_BYTES = 1 << 30
_TORCH_TIMEOUT_S = 60.0
_ANSWER_TIMEOUT_S = 2.0

_REQUIRED = (
    "cloudpickle", "msgpack", "msgspec", "numpy", "pydantic-settings", "rich", "shtab", "tyro", "zstandard",
)  # fmt: skip
_ASK_TORCH = (
    "import torch; d = torch.distributed; print(torch.__version__, torch.cuda.device_count(), d.is_available())"
)


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check: `broken` prevents traceml from working, a `note` disables a feature."""

    name: str
    state: State
    text: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting's value as text and its source; a secret is not shown."""

    name: str
    value: str
    source: str


def all_checks() -> Iterator[Check]:
    """Yield all checks; torch takes a second."""
    yield _installation(PACKAGE.parent, shutil.which("traceml"))
    yield _python()
    yield from _packages()
    yield _torch()
    try:
        config = load()
    except SettingsError as error:
        yield Check("settings", "broken", str(error), "correct it in its source")
        return

    yield Check("settings", "ok", _origins(config))
    yield from _plugins(config)
    yield _runs_dir(config.runs_dir)
    yield _flight_folder(Path("/dev/shm"))  # noqa: S108 - only checked
    yield _token_folder()
    yield _aggregator(config)
    yield _devices()
    yield _terminal()


def setting_values(config: Config) -> list[Setting]:
    """Return every setting with its value and source; a password in an address or a tracker's option is masked."""
    masker = secrets_only(config.mask)
    return [
        Setting(
            name,
            _shown(masker.mask_value(name, getattr(config, name)), secret=declared.secret),
            config.sources.get(name, "default"),
        )
        for name, declared in declarations().items()
    ]


def _shown(value: object, *, secret: bool) -> str:
    if value is None or value in ((), [], {}):
        return "-"

    if secret:
        return "(set, not shown)"

    if isinstance(value, tuple | list):
        return ", ".join(map(str, value))

    return str(value).lower() if isinstance(value, bool) else str(value)


def _origins(config: Config) -> str:
    own = {name: source for name, source in config.sources.items() if source != "default"}
    return "all defaults" if not own else f"{len(own)} set by you: {', '.join(own)}"


def _plugins(config: Config) -> Iterator[Check]:
    """Check the names of plugins, and the options of the trackers; none that is not built in is imported."""
    wanted = [(PluginType.BACKEND, name) for name in dict.fromkeys((*config.backend, *config.backend_options))]
    wanted += [(PluginType.FRAMEWORK, name) for name in config.frameworks]
    wanted += [(PluginType.COLLECTOR, name) for name in config.collectors]
    for kind, name in wanted:
        try:
            check_name(kind, name)
        except PluginError as error:
            yield Check("plugins", "note", str(error), f"correct, unless your script registers {name!r}")
            continue

        try:
            if kind is PluginType.BACKEND:
                check_backend(name, config.backend_options.get(name, {}))
        except PluginError as error:
            yield Check(
                "plugins", "note", str(error), f"correct [backends.{name}] in {config.sources['backend_options']}"
            )


def _installation(folder: Path, command: str | None) -> Check:
    """Check that no other product has the package or the command.

    Args:
        folder: the folder that contains the package.
        command: path of the command `traceml`; None without one.
    """
    text = f"{__version__} in {folder / 'traceml'}"
    if found := foreign_distributions(folder):
        return Check("traceml", "broken", f"{text}, mixed with {' and '.join(found)}", foreign_hint(found))

    if command is not None and not _is_own_command(Path(command)):
        hint = "pip uninstall the other product, or run `python -m traceml`"
        return Check("traceml", "note", f"{text}, but the command {command} is another product's", hint)

    return Check("traceml", "ok", text)


def _is_own_command(path: Path) -> bool:
    try:
        text = path.read_bytes()[:4096]
    except OSError:
        return True

    return b"traceml_torch" in text or b"traceml.cli" in text


def _python() -> Check:
    text = f"{platform.python_version()} at {sys.executable}, {platform.system()} {platform.release()}"
    if sys.platform != "linux":
        return Check(
            "python",
            "note",
            text,
            "traceml supports Linux; samplers and flight files are not available on other systems",
        )

    if limits := free_threading_limits():
        return Check("python", "note", text, limits)

    return Check("python", "ok", text)


def _packages() -> Iterator[Check]:
    versions = {name: _version(name) for name in _REQUIRED}
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        yield Check("packages", "broken", f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}")
        return

    yield Check("packages", "ok", ", ".join(f"{name} {version}" for name, version in versions.items()))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _torch(command: Sequence[str] = (sys.executable, "-P", "-c", _ASK_TORCH)) -> Check:
    """Import torch in a separate process, as the import may crash it."""
    if _version("torch") is None:
        return Check("torch", "note", "not installed: reports work, training does not", install_command("torch"))

    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=_TORCH_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Check("torch", "broken", f"`import torch` took more than {left_text(_TORCH_TIMEOUT_S)}")

    if asked.returncode != 0:
        said = asked.stderr.strip().splitlines()
        why = f"fails: {said[-1]}" if said else end_of_status(asked.returncode)
        return Check("torch", "broken", f"`import torch` {why}", "reinstall torch")

    version, devices, distributed = asked.stdout.split()
    text = f"{version}, {plural(int(devices), 'CUDA device')}"
    if distributed != "True":
        return Check("torch", "note", f"{text}, without torch.distributed", "several ranks need it")

    return Check("torch", "ok", text)


def _runs_dir(folder: Path) -> Check:
    place = folder.absolute()
    existing = next(each for each in (place, *place.parents) if each.exists())
    hint = "set TRACEML_RUNS_DIR, or runs_dir in traceml.toml, to a folder that you may write"
    if not existing.is_dir():
        return Check("runs_dir", "broken", f"{existing} is not a folder", hint)

    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Check("runs_dir", "broken", f"{place} cannot be written: {error.strerror}", hint)

    free = shutil.disk_usage(existing).free
    text = f"{place}{'' if existing == place else ' (will be created)'}, {bytes_text(free)} free"
    if free < _RUNS_FREE_BYTES:
        return Check("runs_dir", "note", text, "free some space: `traceml runs --prune` removes old runs")
    if network := network_filesystem(place):
        hint = "stores are written without a write-ahead log there, which takes longer; a local disk is faster"
        return Check("runs_dir", "note", f"{text}, on a network filesystem ({network})", hint)

    return Check("runs_dir", "ok", text)


def _flight_folder(folder: Path) -> Check:
    """Check the folder whose flight files keep the rows of a killed rank; the run's folder is the other choice."""
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return Check("flight files", "note", f"{folder} cannot be written; the run's folder is used instead")

    usage = shutil.disk_usage(folder)
    text = f"{folder}, {bytes_text(usage.free)} of {bytes_text(usage.total)} free"
    if usage.free < _FLIGHT_FREE_BYTES:
        return Check("flight files", "note", text, "ranks keep fewer rows; in a container: docker run --shm-size=1g")

    return Check("flight files", "ok", text)


def _token_folder() -> Check:
    """Check that there is a folder for tokens, and for the log of an aggregator that a job starts."""
    from traceml.transport import auth

    try:
        return Check("tokens", "ok", f"their files are in {auth.runtime_folder()}")
    except OSError as error:
        hint = "without one no job can start its own aggregator, except by `traceml run`"
        return Check("tokens", "broken", str(error), hint)


def _aggregator(config: Config) -> Check:
    from traceml.transport import auth
    from traceml.transport.client import connect
    from traceml.transport.folder_aggregator import AggregatorAddress, address_of
    from traceml.transport.hello import Hello

    found = None if config.address_given else address_of(config.runs_dir, config.port)
    address = found or AggregatorAddress(config.host, config.port)
    where = f"{address.host}:{address.port}"
    other = auth.discover(config.port)
    own = "for this folder, `traceml serve --port 0` or traceml.init(local=True) starts one next to it"
    if found is None and not config.address_given and other is not None:
        return Check("aggregator", "note", f"the one at {where} serves another runs folder, {other.runs_dir}", own)

    if found is None and _is_free(config.host, config.port):
        return Check("aggregator", "ok", f"{where} is free: no aggregator is running, `traceml serve` can start there")

    try:
        hello = Hello(role="client")
        token = config.token or address.token
        connect(
            address.host,
            address.port,
            hello,
            token,
            timeout_s=_ANSWER_TIMEOUT_S,
            tries=1,
            tls=config.tls or address.tls,
        ).close("doctor")
    except AggregatorRefusedError as error:
        if isinstance(error, AggregatorForeignError) and not config.address_given:
            return Check("aggregator", "note", str(error), own)

        return Check("aggregator", "broken", str(error), "choose another port with TRACEML_PORT, or set TRACEML_TOKEN")
    except AggregatorUnavailableError as error:
        hint = "choose another with TRACEML_PORT, or start `traceml serve` on that host"
        return Check("aggregator", "broken", f"{where} does not answer as an aggregator: {error.reason}", hint)

    return Check("aggregator", "ok", f"running at {where}")


def _is_free(host: str, port: int) -> bool:
    """Whether no process listens on a port of this host."""
    try:
        with socket.create_server((host, port)):
            return True
    except OSError:
        return False


def _devices() -> Check:
    from traceml.samplers.nvml import Nvml, NvmlError

    try:
        nvml = Nvml()
    except NvmlError:
        return Check("gpu", "ok", "no NVIDIA driver; training on the CPU is traced without it")

    try:
        count = len(nvml.devices())
    except NvmlError as error:
        return Check("gpu", "note", f"NVML returns an error: {error}", "device metrics are not available")
    finally:
        nvml.close()

    return Check("gpu", "ok", f"{plural(count, 'device')} seen by NVML")


def _terminal() -> Check:
    from traceml.renderers.text.live_panel import MIN_HEIGHT, MIN_WIDTH
    from traceml.renderers.text.viewport import ASCII, Viewport, plain_console

    console = plain_console()
    if not console.is_terminal:
        return Check("terminal", "ok", "standard output is not a terminal: no live view")

    viewport = Viewport.of(console)
    text = f"{console.width} x {console.height}, {'no colors' if not viewport.color else console.color_system} "
    text += "and ASCII" if viewport.glyphs is ASCII else "and UTF-8"
    if console.is_dumb_terminal:
        return Check("terminal", "note", f"TERM={os.environ.get('TERM', '')} cannot show the live view")

    if console.width < MIN_WIDTH or console.height < MIN_HEIGHT + 5:
        hint = f"the live view needs {MIN_WIDTH} x {MIN_HEIGHT + 5}"
        return Check("terminal", "note", f"{text}: too small for the live view", hint)

    return Check("terminal", "ok", text)
