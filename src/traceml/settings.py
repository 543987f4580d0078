"""Settings: one declaration per setting, and a loader that records the source of each value.

`Config` is the declaration: its fields are the settings, with type, default, description and limits. `load()` fills one
from arguments, environment, project file and user file, which `setting_sources.py` reads, with the standard library
alone, because every training process calls it. `Settings` is the same table as a pydantic-settings class, created on
first use.

`python -m traceml.settings` writes the reference page `docs/settings.md`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, get_type_hints

from traceml.ids import DEFAULT_PROJECT
from traceml.setting_sources import ENV_PREFIX, INTERNAL_ENV, USER_ENV, Declaration, SettingSources

if TYPE_CHECKING:

    class Settings:
        """The settings as a pydantic-settings class; see `_settings_class`."""

        sources: dict[str, str]

        def __init__(self, **arguments: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...


__all__ = [
    "PROFILE_AFTER_S",
    "Config",
    "SamplerName",
    "Settings",
    "declarations",
    "level_number",
    "load",
    "reference",
]


SamplerName = Literal["gpu", "host", "host_limits", "limits", "loader_workers", "process", "torch_memory"]
PROFILE_AFTER_S = 60
"""Value of `profile_on_finding` where a command turns it on, seconds."""


def _set(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    secret: bool = False,
) -> Any:
    """Declare one setting: its default, its description, and the limits of a number."""
    return _SettingField(default, doc, {"low": low, "high": high, "above": above}, secret)


class _SettingField(NamedTuple):
    default: Any
    doc: str
    limits: Mapping[str, float | None]
    secret: bool


class Config:
    """Settings in force, with the source of each in `sources`.

    A source is `default`, `argument`, the name of an environment variable, or the path of a file. An instance does not
    change. It is no dataclass: `traceml run`, whose script waits, would take 8 ms to make one.
    """

    def __init__(self, *, sources: Mapping[str, str] | None = None, **values: Any) -> None:
        if unknown := values.keys() - _fields().keys():
            raise TypeError(f"unknown settings: {', '.join(sorted(unknown))}")

        vars(self).update({name: _copy(each.default) for name, each in _fields().items()} | values)
        vars(self)["sources"] = {} if sources is None else sources

    def __setattr__(self, name: str, _value: object) -> NoReturn:
        raise AttributeError(f"{name!r} cannot be set: settings in force do not change")

    def __repr__(self) -> str:
        shown = (f"{name}={getattr(self, name)!r}" for name, each in _fields().items() if not each.secret)
        return f"Config({', '.join(shown)})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Config):
            return NotImplemented

        return all(getattr(self, name) == getattr(other, name) for name in _fields())

    __hash__ = None  # type: ignore[assignment]  # some values are maps

    enabled: bool = _set(True, "Trace this process. When off, every call is a no-op: no thread, no connection.")
    host: str = _set(
        "127.0.0.1",
        "The aggregator's address. With `host` or `port` set, the run is stored by that aggregator, wherever its runs "
        "are; otherwise by the one that serves `runs_dir`, which publishes its address in a file there. `traceml run` "
        "and `launch` do not use it: they start an aggregator.",
    )
    port: int = _set(29765, "The aggregator's TCP port; for `serve`, 0 means any free one.", low=0, high=65535)
    token: str | None = _set(
        None,
        "Secret shared with the aggregator. Found automatically on one host; between hosts set it in "
        "the environment or in a file, never in a command line.",
        secret=True,
    )
    tls: bool = _set(
        False,
        "Encrypt connections: set it for the aggregator, and for ranks that are given its address. The proofs of the "
        "token include the aggregator's certificate. Connections of `traceml launch`, and of `run` on one node, "
        "stay on one host or go through ssh.",
    )
    local: bool = _set(
        False, "Start an aggregator for this job on this host when none answers; on a free port if `port` is in use."
    )
    on_missing: Literal["raise", "warn"] = _set(
        "raise", "When no aggregator answers: raise an error, or warn once and keep trying in the background."
    )
    connect_timeout: float = _set(
        5.0,
        "Longest time in seconds that `init` tries to connect to the aggregator. One that starts with the job has at "
        "least 20.",
        low=0,
    )
    runs_dir: Path = _set(
        Path("traceml_runs"),
        "Folder of the runs, relative to the working directory; under Hydra to the one in which it was started.",
    )
    log_dir: Path = _set(Path("traceml_logs"), "Folder of the launcher's log files.")
    fleet_dir: Path | None = _set(
        None,
        "Folder of the fleet's dataset, for `traceml fleet`. When it is set, the aggregator adds each run at its end. "
        "Needs the extra `parquet`.",
    )
    upstream: str | None = _set(
        None,
        "Address (`HOST:PORT`) of another aggregator to which `traceml serve` sends the merged rows of its ranks, "
        "so that the ranks of all hosts are one run there. Both prove the same `token`, and `tls` is for both.",
    )
    run_id: str | None = _set(None, "Key by which the ranks of one job find their run; also the name of its folder.")
    run_name: str | None = _set(None, "Name of the run; by default the name of the script.")
    project: str = _set(DEFAULT_PROJECT, "Project of the run in trackers.")
    backend: tuple[str, ...] = _set((), "Trackers to deliver to: built-in names or `package:Class`.")
    backend_options: dict[str, dict[str, Any]] = _set(
        {}, "Options per tracker; in a file, one table `backends.<name>` per tracker."
    )
    collectors: tuple[str, ...] = _set((), "Additional collectors: registered names or `package:Class`.")
    frameworks: tuple[str, ...] = _set(
        ("tensorboard", "lightning", "huggingface", "ray"), "Frameworks whose logging calls are captured."
    )
    track_system: bool = _set(True, "Record facts about the host, and send them and system metrics to the trackers.")
    track_git: bool = _set(True, "Record the state of the git repository, and send it to the trackers.")
    track_env: bool = _set(True, "Record the environment (versions, variables), and send it to the trackers.")
    collect_after: float = _set(
        10.0,
        "Age in seconds of a run without `Experiment`, tracker or collectors at which its aggregator reads uncommitted "
        "changes, packages, variables and facts about the host, if rank 0 is on that host.",
        low=0,
    )
    sample_interval: float = _set(1.0, "Seconds between samples of process, host and devices.", low=0.01)
    sampler_intervals: dict[SamplerName, float] = _set({}, "Seconds between samples, by sampler name.", low=0.01)
    stack_interval: float = _set(
        0.1,
        "Seconds between samples of the line that the training thread, or a loader worker, runs; 0 turns them off.",
        low=0,
    )
    hang_timeout: float = _set(
        60.0,
        "Seconds without any progress (step, batch, forward, collective, output, another line) after which the job "
        "hangs. A rank that computes gets five times as long, or twice if others wait for it; no rank gets less than "
        "such pauses have taken before.",
        above=0,
    )
    on_hang: Literal["report", "abort"] = _set(
        "report",
        "When the job hangs: report it, or also write the report and end the job with a status other than 0.",
    )
    on_finding: tuple[str, ...] = _set(
        (),
        "Commands (run by the shell, with JSON on standard input) and webhook URLs (which get the same JSON) that are "
        "notified of each finding once per run. The aggregator runs them, with its own settings. In the environment a "
        "command with a comma needs a JSON list.",
        secret=True,
    )
    on_finding_after: float = _set(30.0, "Seconds that a finding must persist before `on_finding` is notified.", low=0)
    profile_on_finding: float = _set(
        0.0,
        "Seconds that the verdict has to be computation before the aggregator profiles the job automatically, once "
        "per run; 0: never. The longest operators are then evidence of the finding.",
        low=0,
    )
    metrics_interval: float = _set(30.0, "Seconds between system metrics sent to trackers.", above=0)
    flush_interval: float = _set(1.0, "Longest time in seconds that a row waits in the rank.", low=0.01)
    ring_rows: int = _set(
        65536,
        "Step rows kept in the rank until acknowledged; rounded up to a power of two, fewer if memory is short.",
        low=64,
        high=1 << 24,
    )
    max_queue_size: int = _set(
        10_000, "Logged rows kept in memory until acknowledged; further rows go to a journal on disk.", low=1
    )
    max_retries: int = _set(
        3, "Failed tries in a row before a tracker's circuit breaker opens; 0 is the same as 1.", low=0
    )
    backoff_factor: float = _set(2.0, "Factor by which the wait between tries grows.", low=1)
    max_backoff: float = _set(60.0, "Longest wait in seconds between tries; rows are never discarded.", above=0)
    max_image_bytes: int = _set(8 << 20, "Largest image that is logged, in bytes.", low=1)
    max_artifact_bytes: int = _set(1 << 30, "Largest artifact that is logged, in bytes.", low=1)
    include: tuple[str, ...] = _set((), "Names (patterns) that are delivered to trackers; empty means all.")
    exclude: tuple[str, ...] = _set((), "Names (patterns) that are not delivered to trackers.")
    mask: tuple[str, ...] = _set(
        (),
        "Patterns of keys and values that are masked before rows leave the machine: shell patterns, or "
        "`re:EXPRESSION`. `!NAME` exempts a name; `!email`, `!phone`, `!card` and `!user` turn a kind off. A "
        "pattern with a comma needs a list (JSON in the environment).",
    )
    otlp_endpoint: str | None = _set(
        None,
        "Base URL of an OpenTelemetry collector (`http://collector:4318`) to which the aggregator sends metrics and "
        "spans; without it OpenTelemetry's own variables count, such as OTEL_EXPORTER_OTLP_ENDPOINT.",
    )
    topology_file: Path | None = _set(
        None,
        "File of the cluster's switches, in the format of Slurm's topology.conf (`SwitchName=leaf1 Nodes=gpu[01-32]`), "
        "on each host. With it a verdict can name the switch of slow ranks. Without it, ranks that Slurm started "
        "use SLURM_TOPOLOGY_ADDR.",
    )
    local_only: bool = _set(False, "Deliver only to trackers, collectors and webhooks on this machine.")
    keep_runs: int | None = _set(
        None,
        "Number of runs to keep: when a run has ended and is delivered, older delivered runs of the same user "
        "without a tag are removed. Without it all runs stay.",
        low=1,
    )
    retention: float | Literal["off"] = _set(
        1.0,
        "Gigabytes of steps and samples that a run keeps, at least 0.0005 per rank. Beyond them, old rows are thinned "
        "to blocks of steps spread over the run. Sums of the whole run stay exact, and logged values are never "
        "removed.",
        above=0,
    )
    delivery_nice: int = _set(
        10,
        "Nice value of delivery processes, and of those that read uncommitted changes and packages. Next to a training "
        "that uses every core, a process gets a tenth of one at 10 and a hundredth at 19, where a tracker's library "
        "takes minutes to load.",
        low=0,
        high=19,
    )
    debug: bool = _set(
        False, "Write a profile of each delivery process next to its state, and show what a rank's collectors print."
    )
    quiet: bool = _set(
        False,
        "Print nothing: neither the line at the start that says where the run is stored, nor the verdict at the end.",
    )
    log_level: int | Literal["debug", "info", "warning", "error", "critical"] = _set(
        "warning", "Level of the `traceml` logger.", low=0
    )

    sources: Mapping[str, str]

    def over(self, **arguments: Any) -> Config:
        """Return these settings with some replaced by arguments; see `load`.

        Raises:
            SettingsError: an unknown name or a bad value.
        """
        given = list(SettingSources(declarations()).arguments(arguments))
        sources = {**self.sources, **{name: source for source, name, _ in given}}
        return self.replaced(**{name: value for _, name, value in given}, sources=sources)

    def replaced(self, **values: Any) -> Config:
        """Return these settings with other values, which are not checked."""
        return Config(**{**vars(self), **values})

    @property
    def arguments(self) -> dict[str, Any]:
        """The values that arguments have given, for `load` in another process."""
        return {name: getattr(self, name) for name, source in self.sources.items() if source == "argument"}

    @property
    def supervised(self) -> bool:
        """Whether `traceml run` or `launch` started this process and gave it its aggregator."""
        return self.sources.get("host") == "TRACEML_ADDRESS"

    @property
    def address_given(self) -> bool:
        """Whether the aggregator's address was set; else it is that of the runs folder's aggregator."""
        return any(self.sources.get(name, "default") != "default" for name in ("host", "port"))


@cache
def _fields() -> Mapping[str, _SettingField]:
    return {name: each for name, each in vars(Config).items() if isinstance(each, _SettingField)}


def _copy(default: Any) -> Any:
    return dict(default) if isinstance(default, dict) else default


@cache
def declarations() -> Mapping[str, Declaration]:
    """Return every setting by name, in the order of declaration."""
    kinds = get_type_hints(Config)
    return {name: Declaration(name, kinds[name], *each) for name, each in _fields().items()}


def load(environ: Mapping[str, str] | None = None, folder: Path | None = None, /, **arguments: Any) -> Config:
    """Read the settings: arguments over environment over project file over user file over defaults.

    Args:
        environ: the environment; by default this process's.
        folder: start of the search for a project file, upwards; by default the working directory.
        arguments: settings by name; None counts as not given, unless the setting may be None.

    Raises:
        SettingsError: an unknown name or a bad value, with its source and what is allowed.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    sources = dict.fromkeys(declarations(), "default")
    given = SettingSources(declarations())
    layers = (
        given.user_file(environ),
        given.project_file(folder),
        given.environment(environ),
        given.arguments(arguments),
    )
    for layer in layers:
        for source, name, value in layer:
            values[name], sources[name] = value, source

    for name, value in given.supervisor(environ).items():
        values[name], sources[name] = value, "TRACEML_ADDRESS" if name in {"host", "port"} else declarations()[name].env

    launched_in = _launch_folder()
    if launched_in is not None:
        values["runs_dir"] = launched_in / values.get("runs_dir", declarations()["runs_dir"].default)

    return Config(**values, sources=sources)


def level_number(level: int | str) -> int:
    """Return a value of `log_level` as a number of `logging`."""
    return level if isinstance(level, int) else logging.getLevelNamesMapping()[level.upper()]


def _launch_folder() -> Path | None:
    """Return the folder in which Hydra was started, as its `job.chdir` moves each rank into a folder of its own."""
    hydra = sys.modules.get("hydra.core.hydra_config")
    with suppress(AttributeError, LookupError, TypeError, ValueError):  # another version of Hydra
        if hydra is not None and hydra.HydraConfig.initialized():
            return Path(hydra.HydraConfig.get().runtime.cwd)

    return None


# --- the reference page; the pydantic form ----------------------------------------------------------------------


def reference() -> str:
    """Return the reference page of the settings, in Markdown."""
    lines = [_REFERENCE_HEAD]
    for each in declarations().values():
        default = each.default
        shown = ", ".join(default) if isinstance(default, tuple) else default
        shown = "-" if shown is None or shown in ("", {}) else str(shown).lower() if shown in (True, False) else shown
        lines.append(f"| `{each.name}` | {shown} | {each.doc} | {each.allowed} |")

    lines.append(_REFERENCE_USER)
    lines.extend(f"- `{name}`: {doc}." for name, doc in sorted(USER_ENV.items()))
    lines.append(_REFERENCE_INTERNAL)
    lines.extend(f"- `{name}`: {doc}." for name, doc in sorted(INTERNAL_ENV.items()))
    return "\n".join(lines) + "\n"


_REFERENCE_HEAD = """\
# Settings

Generated by `python -m traceml.settings` from the declarations in `src/traceml/settings.py`.

Precedence, highest first: arguments of `traceml.init()`, environment variables (`TRACEML_` + the name in upper case;
lists comma-separated or JSON, maps JSON), the project file (`traceml.toml`, or `[tool.traceml]` in `pyproject.toml`,
found upwards from the working directory), the user file (`$XDG_CONFIG_HOME/traceml/config.toml`), defaults. An unknown
name, a bad value, a file that cannot be read, and two names of one setting in one source (`backend` and `backends`) are
errors that name the source; a `pyproject.toml` that cannot be read is a warning. `traceml doctor` prints every value
and its source.

`traceml run` and `launch` set the aggregator's address, the token and the run's id, which override arguments.

`TRACEML=1` is not a setting but a switch: it traces every script that trains, without `traceml.init()`, as if `local`
were true and `on_missing` were `warn` unless they are set.

| setting | default | description | allowed |
|---|---|---|---|"""

_REFERENCE_USER = """
## Variables without a setting

These exist only in the environment.
"""

_REFERENCE_INTERNAL = """
## Variables that our own processes set for each other

These are not settings; do not set them.
"""


def _settings_class() -> Any:
    """Create the pydantic-settings class from the declarations; `load` provides its values, so the two always agree."""
    from pydantic import Field, PrivateAttr, create_model
    from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

    class Base(BaseSettings):
        """Settings of traceml, typed, each with a description.

        Examples:
            >>> traceml.Settings(project="vision").project
            'vision'
        """

        model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)
        _sources: dict[str, str] = PrivateAttr(default_factory=dict)

        def __init__(self, **arguments: Any) -> None:
            config = load(**arguments)
            super().__init__(**{name: _as_list(getattr(config, name)) for name in declarations()})
            self._sources.update(config.sources)

        @property
        def sources(self) -> dict[str, str]:
            """Source of each value."""
            return dict(self._sources)

        @property
        def backends(self) -> list[str]:
            """Value of `backend`, by its other name."""
            trackers: list[str] = getattr(self, "backend")  # noqa: B009 - a field of the class that is made below
            return trackers

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],  # noqa: ARG003 - the signature is pydantic's
            init_settings: PydanticBaseSettingsSource,
            *_: Any,
            **__: Any,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (init_settings,)

    model_fields: dict[str, Any] = {
        each.name: (
            list[str] if each.kind == tuple[str, ...] else each.kind,
            Field(default=_as_list(each.default), description=each.doc, repr=not each.secret),
        )
        for each in declarations().values()
    }
    return create_model("Settings", __base__=Base, __module__=__name__, __doc__=Base.__doc__, **model_fields)


def _as_list(value: Any) -> Any:
    """Return a tuple as the list that users compare it with; any other value as it is."""
    return list(value) if isinstance(value, tuple) else value


def __getattr__(name: str) -> Any:
    if name != "Settings":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    made = _settings_class()
    globals()[name] = made
    return made


if __name__ == "__main__":
    import sys

    sys.stdout.write(reference())
