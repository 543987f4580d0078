"""Settings of any values, from the environment, files and arguments; hosts of a launch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.generated.targets import DAMAGE, JSON_VALUES, TEXTS, Damage, Target, refusal
from traceml.errors import SettingsError, SlurmError, UsageError
from traceml.launch.launcher.hosts.hostfile import is_hostfile, read_hostfile, split_port
from traceml.launch.launcher.hosts.hosts import resolve_hosts
from traceml.settings import Config, declarations, load

__all__ = ["TARGETS"]

_NOWHERE = Path("/proc")
_NAMES = st.sampled_from([*declarations(), "backends", "prot", "ADDRESS"])
_GOOD_TOML = b"""\
[project]
name = "mine"

[tool.traceml]
port = 1003
runs_dir = "runs"
backend = ["jsonl", "tensorboard"]
tracks = {a = 1}
"""


def _environ(variables: dict[str, str], _folder: Path) -> None:
    """Any value of a variable is a setting or refused with the variable's name."""
    environ = {f"TRACEML_{name.upper()}": text for name, text in variables.items()}
    error = refusal(lambda: _loaded(environ, _NOWHERE))
    assert error is None or (isinstance(error, SettingsError) and error.source in {*environ, "mask"})


def _toml(value: tuple[Damage, str], folder: Path) -> None:
    damage, name = value
    (folder / name).write_bytes(damage.of(_GOOD_TOML))
    assert isinstance(refusal(lambda: _loaded({}, folder)), SettingsError | None)


def _toml_values(value: tuple[dict[str, Any], bool], folder: Path) -> None:
    """A file of valid TOML with any values is a project's or refused."""
    table, is_nested = value
    lines = [f"{json.dumps(key)} = {_as_toml(each)}" for key, each in table.items()]
    head = "tool = 3\n" if is_nested else "[tool.traceml]\n" + "\n".join(lines)
    (folder / "pyproject.toml").write_text(f"# traceml\n{head}\n", encoding="utf-8", errors="replace")
    assert isinstance(refusal(lambda: _loaded({}, folder)), SettingsError | None)


def _as_toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_as_toml(each)}" for key, each in value.items()) + "}"

    if isinstance(value, list):
        return "[" + ", ".join(map(_as_toml, value)) + "]"

    return {None: '"none"'}.get(value) or json.dumps(value, ensure_ascii=True)


def _arguments(arguments: dict[str, Any], _folder: Path) -> None:
    assert isinstance(refusal(lambda: load({}, _NOWHERE, **arguments)), SettingsError | None)


def _loaded(environ: dict[str, str], folder: Path) -> Config:
    config = load(environ, folder)
    repr(config)
    for name, declared in declarations().items():
        assert declared.kind is not int or isinstance(getattr(config, name), int)

    return config


def _hosts(value: tuple[Any, Any, dict[str, str]], _folder: Path) -> None:
    """Hosts and variables of any text are a launch's or refused; ssh is not asked."""
    names, numbers, variables = value
    error = refusal(lambda: resolve_hosts(names, numbers, None, {"PATH": "/nowhere", **variables}))
    assert isinstance(error, UsageError | SlurmError | None)


def _hostfile(value: tuple[Damage, str], folder: Path) -> None:
    """A hostfile and host names of any text are read or refused."""
    damage, name = value
    path = folder / "hosts"
    path.write_bytes(damage.of(b"# cluster\nnode1 slots=8\nnode2:2222 slots=4 max_slots=8\n[fe80::1]:22\n"))
    assert isinstance(refusal(lambda: read_hostfile(path)), UsageError | None)
    assert isinstance(refusal(lambda: split_port(name)), UsageError | None)
    is_hostfile(name)


_JSON = st.recursive(
    st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=10)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=5,
)
_ENV_TEXTS = TEXTS.filter(lambda text: "\0" not in text)
_HOST_NAMES = st.one_of(st.sampled_from(["localhost", "auto", "slurm", "-oProxyCommand=x", "a b"]), TEXTS)
_SLURM = st.sampled_from(
    ["SLURM_JOB_ID", "SLURM_HET_SIZE", "SLURM_JOB_NODELIST", "SLURM_JOB_CPUS_PER_NODE", "SLURM_STEP_NUM_TASKS",
     "SLURM_CPUS_PER_TASK", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS"]
)  # fmt: skip
_SLURM_TEXTS = st.one_of(_ENV_TEXTS, st.sampled_from(["1", "0", "-1", "4(x2)", "4(x99999999999999)", "a[1-3]"]))
TARGETS = (
    Target("settings in the environment", st.dictionaries(_NAMES, _ENV_TEXTS, max_size=3), _environ, 80),
    Target(
        "settings file",
        st.tuples(DAMAGE, st.sampled_from(["pyproject.toml", "traceml.toml"])),
        _toml,
        40,
    ),
    Target(
        "settings in a project",
        st.tuples(st.dictionaries(_NAMES, _JSON, max_size=3), st.sampled_from([False, False, False, True])),
        _toml_values,
        60,
    ),
    Target("settings as arguments", st.dictionaries(_NAMES, JSON_VALUES, max_size=3), _arguments, 80),
    Target(
        "hostfile", st.tuples(DAMAGE, st.one_of(TEXTS, st.sampled_from(["a:22", "a:" + "9" * 5000]))), _hostfile, 50
    ),
    Target(
        "hosts of a launch",
        st.tuples(
            st.one_of(_HOST_NAMES, st.lists(_HOST_NAMES, max_size=3)),
            st.one_of(st.integers(-1, 3), st.lists(st.integers(-1, 3), max_size=3), _HOST_NAMES),
            st.dictionaries(_SLURM, _SLURM_TEXTS, max_size=4),
        ),
        _hosts,
        60,
        starts=True,
    ),
)
