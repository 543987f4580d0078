"""Values of settings as arguments, environment and files give them: found, named and checked.

`SettingSources` knows the settings by their declarations in `settings.py`, and yields (source, setting, value).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

from traceml.coerce import BAD, allowed, coerce
from traceml.errors import SettingsError
from traceml.fail_open import fail_open
from traceml.ids import RUN_ID_ALLOWED, safe_run_id
from traceml.trusted_files import read_regular

__all__ = [
    "ENV_PREFIX",
    "INTERNAL_ENV",
    "TLS_PREFIX",
    "USER_ENV",
    "Declaration",
    "SettingEntry",
    "SettingSources",
    "former_setting",
    "setting_name",
]

ENV_PREFIX = "TRACEML_"
TLS_PREFIX = "tls://"
"""Begin of TRACEML_ADDRESS where the aggregator encrypts connections."""
_log = logging.getLogger("traceml")

# Variables that our own processes set for each other; any other with TRACEML_ is a setting, or in USER_ENV.
INTERNAL_ENV: dict[str, str] = {
    "TRACEML_ADDRESS": "host:port of the aggregator, after tls:// if it encrypts; set by `traceml run` and `launch`, "
    "overrides host and port",
    "TRACEML_FAILURES_FD": "descriptor on which our torchrun, or the script itself, tells `traceml run` of failures",
    "TRACEML_JOB_WARNING_S": "seconds between Slurm's warning and the end of a submitted job",
    "TRACEML_LAUNCH_MARK": "mark by which `launch` finds the processes that its workers have started, to end them too",
    "TRACEML_OUTLIVES": "set for a process that may outlive a launch: an aggregator that a worker has started",
    "TRACEML_COMMAND": "the launcher's command line, shown instead of its workers'",
    "TRACEML_ANNOUNCED": "run whose folder and verdict a parent process prints",
    "TRACEML_NODE_RUN": "`token` or `given`: has our torchrun agree with other nodes on one run, and show them the "
    "token, or rely on one that all were given",
    "TRACEML_PARENT": "run of the parent process, for the processes that it starts",
}
# Variables that users may set for tools that read no settings file.
USER_ENV: dict[str, str] = {
    "TRACEML_CACHE_DIR": "folder in which `traceml analyze` keeps results",
    "TRACEML_NATIVE": "with `0`, Python is used in place of what is compiled C: the hooks, which then cost some "
    "microseconds more per step, and the scanner of traces; same results",
}
# Other spellings that files accept, known from similar tools.
_ALIASES = {"backends": "backend"}
# Lists whose items may well hold a comma: only the environment, where there is no other list, splits their texts.
_WHOLE_TEXTS = frozenset({"on_finding"})
# Values that may hold a key beside what may be shown.
_NOT_QUOTED = frozenset({"backend_options"})
_PORT_DIGITS = 5
SettingEntry = tuple[str, str, Any]
"""(source, setting, value)."""
_Given = tuple[str, Any, str, str]
"""(key, value, source, the key as the user wrote it)."""
# Settings of traceml-ai, another product of the same import name: the argument of its `init`, or its variable without
# TRACEML_ -> the setting here.
_RENAMED = {
    "aggregator_host": "host",
    "aggregator_bind_host": "host",
    "aggregator_port": "port",
    "connect_timeout_sec": "connect_timeout",
    "interval": "sample_interval",
    "logs_dir": "runs_dir",
    "on_missing_aggregator": "on_missing",
    "session_id": "run_id",
}
_ELSEWHERE = {
    "dashboard_port": "`traceml serve --web PORT`",
    "disabled": "`enabled=False`, or TRACEML_ENABLED=0",
    "enable_logging": "`log_level`, or TRACEML_LOG_LEVEL=debug",
    "expected_world_size": "nothing to set: the ranks report the size of the job",
    "html_report": "nothing to set: each run has a report.html",
    "master_addr": "an option of `traceml run`, as of torchrun: --master-addr",
    "master_port": "an option of `traceml run`, as of torchrun: --master-port",
    "mode": "nothing to set for mode='auto'; steps are marked by hand with `traceml.trace_step()`",
    "nnodes": "an option of `traceml run`, as of torchrun: --nnodes",
    "node_rank": "an option of `traceml run`, as of torchrun: --node-rank",
    "nproc_per_node": "an option of `traceml run`, as of torchrun: --nproc-per-node",
    "profile": "`traceml profile`, on a running job",
    "ui_mode": "`traceml run --live terminal|web|none`",
    **dict.fromkeys(
        ("patch_backward", "patch_dataloader", "patch_forward", "patch_h2d"),
        "nothing to set: all phases are measured",
    ),
}


class Declaration(NamedTuple):
    """Declaration of one setting, for tools that print or check it."""

    name: str
    kind: Any
    default: Any
    doc: str
    limits: Mapping[str, float | None]
    secret: bool

    @property
    def env(self) -> str:
        """The environment variable that sets it."""
        return ENV_PREFIX + self.name.upper()

    @property
    def allowed(self) -> str:
        """Accepted values, in words."""
        return allowed(self.kind, self.limits)


class SettingSources:
    """Yields the values of settings that one source has, in their own types.

    Raises:
        SettingsError: an unknown name or a bad value, with its source and what is allowed. All methods may raise it.
    """

    def __init__(self, declared: Mapping[str, Declaration]) -> None:
        self._declared = declared

    def __repr__(self) -> str:
        return f"SettingSources({len(self._declared)} settings)"

    def arguments(self, arguments: Mapping[str, Any]) -> Iterator[SettingEntry]:
        """Yield the settings that a call was given by name, without None where it is no value of the setting."""
        given = {key: value for key, value in arguments.items() if value is not None or self._may_be_none(key)}
        yield from self._checked((key, value, "argument", key) for key, value in given.items())

    def environment(self, environ: Mapping[str, str]) -> Iterator[SettingEntry]:
        """Yield the settings of the environment; an empty variable counts as unset, but makes a list empty.

        Of spellings that differ in case the one in upper case wins, which `traceml run` sets for its ranks.
        """
        yield from self._checked(self._variables(environ))

    def _variables(self, environ: Mapping[str, str]) -> Iterator[_Given]:
        for variable, text in sorted(environ.items(), key=lambda item: item[0].isupper()):
            upper = variable.upper()
            if not upper.startswith(ENV_PREFIX) or upper in INTERNAL_ENV or upper in USER_ENV:
                continue

            key = upper.removeprefix(ENV_PREFIX).lower()
            if (
                not text.strip()
                and get_origin(self._declared[self._known(key, text, variable, variable)].kind) is not tuple
            ):
                continue

            yield key, text, variable, variable

    def supervisor(self, environ: Mapping[str, str]) -> dict[str, Any]:
        """Return the settings that `traceml run` or `launch` has chosen for this process; they override arguments."""
        address = environ.get("TRACEML_ADDRESS")
        if not address:
            return {}

        host, _, port = address.removeprefix(TLS_PREFIX).rpartition(":")
        if not host or not (port.isascii() and port.isdigit() and len(port) <= _PORT_DIGITS):
            raise SettingsError(
                "TRACEML_ADDRESS", f"{address!r} is not an address", source="TRACEML_ADDRESS", allowed="host:port"
            )

        chosen: dict[str, Any] = {"host": host.strip("[]"), "port": int(port)}
        for name in ("token", "run_id"):
            if value := environ.get(self._declared[name].env):
                chosen[name] = value

        return chosen | {"tls": address.startswith(TLS_PREFIX)}

    def project_file(self, folder: Path | None) -> Iterator[SettingEntry]:
        """Yield from the first `traceml.toml`, or `pyproject.toml` with a `[tool.traceml]`, found upwards."""
        try:
            start = (folder or Path.cwd()).absolute()
        except OSError:  # the working directory was removed
            return

        for place in (start, *start.parents):
            path = place / "traceml.toml"
            if (content := _content_of(path)) is not None:
                yield from self._table(_parse(path, content), path)
                return

            path = place / "pyproject.toml"
            content = None
            with fail_open(_log, "settings", "settings in a pyproject.toml are not used", once=True):
                content = _content_of(path)

            if content is not None and b"traceml" in content:  # else tomllib need not be imported
                tools = _parse(path, content).get("tool")
                table = tools.get("traceml") if isinstance(tools, dict) else None  # else it does not configure traceml
                if table is not None:
                    yield from self._table(table, path)
                    return

    def user_file(self, environ: Mapping[str, str]) -> Iterator[SettingEntry]:
        """Yield from `traceml/config.toml` in the user's folder of configurations."""
        base = environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME", ""), ".config")
        path = Path(base) / "traceml" / "config.toml"
        if path.is_absolute() and (content := _content_of(path)) is not None:
            yield from self._table(_parse(path, content), path)

    def _table(self, table: Any, path: Path) -> Iterator[SettingEntry]:
        if not isinstance(table, dict):
            raise SettingsError("tool.traceml", "is not a table", source=str(path), allowed="a table of settings")

        yield from self._checked(self._keys(table, path))

    def _keys(self, table: Mapping[str, Any], path: Path) -> Iterator[_Given]:
        for key, value in table.items():
            if key in ("traceml", "tool") and isinstance(value, dict) and path.name != "pyproject.toml":
                raise SettingsError(
                    f"[{key}]", "is a table of pyproject.toml", source=str(path),
                    meant="In this file settings are at the top level: leave this heading out",
                )  # fmt: skip

            # `backends` is a list of names, or one table of options per name.
            name = "backend_options" if key == "backends" and isinstance(value, dict) else key
            yield name, value, str(path), key

    def _known(self, key: str, value: Any, source: str, written: str) -> str:
        name = setting_name(key)
        if name in self._declared:
            return name

        former = former_setting(key, is_variable=written.upper().startswith(ENV_PREFIX))
        if former is not None:
            raise SettingsError(written, "is a setting of traceml-ai", source=source, meant=f"Here: {former}")

        import difflib

        near = difflib.get_close_matches(key, [*self._declared, *_ALIASES], n=1)
        # A value under a misspelled name may be a secret: it is not repeated.
        hidden = any(self._declared[setting_name(name)].secret for name in near) or "token" in key.lower()
        problem = "there is no such setting" + ("" if hidden else f"; its value is {value!r:.100}")
        is_variable = written.upper().startswith(ENV_PREFIX)
        meant = [f"{ENV_PREFIX}{name.upper()}" if is_variable else repr(name) for name in near]
        raise SettingsError(
            written,
            problem,
            source=source,
            allowed="the settings that `python -m traceml.settings` describes",
            meant=f"Did you mean {meant[0]}?" if meant else "",
        )

    def _may_be_none(self, key: str) -> bool:
        name = setting_name(key)
        return name not in self._declared or type(None) in get_args(self._declared[name].kind)

    def _checked(self, given: Iterable[_Given]) -> Iterator[SettingEntry]:
        """Yield the settings of one source; refuse two names of the same one, of which one would win silently."""
        spellings: dict[str, str] = {}
        for key, value, source, written in given:
            if (key, value) == ("mode", "auto"):  # of traceml-ai: all that there is here
                continue

            name = self._known(key, value, source, written)
            first = spellings.setdefault(name, written)
            if first.upper() != written.upper():
                raise SettingsError(
                    written, f"sets the same as {first!r}, which is set, too", source=source, allowed="one of the two"
                )

            yield source, name, self._converted(name, value, source, written)

    def _converted(self, name: str, value: Any, source: str, written: str) -> Any:
        """Return a value in its setting's type."""
        declared = self._declared[name]
        is_text = isinstance(value, str) and not value.lstrip().startswith("[")
        if name in _WHOLE_TEXTS and is_text and not source.upper().startswith(ENV_PREFIX):
            value = [value.strip()] if value.strip() else []

        result = coerce(declared.kind, value, declared.limits)
        if result is BAD:
            shown = "a value" if declared.secret or name in _NOT_QUOTED else repr(value)
            raise SettingsError(written, f"{shown} is not allowed", source=source, allowed=declared.allowed)

        if name == "mask" and result:
            from traceml.privacy import Masker

            if is_text:
                _refuse_cut_expressions(result, value, source, written)

            Masker(result, source=source)  # a bad pattern is an error now, not when a value must be masked

        if name == "run_id" and result:
            _refuse_unusable_id(result, source, written)

        return _bare_host(result, source, written) if name == "host" else result


def _bare_host(text: str, source: str, written: str) -> str:
    """Return a host without the brackets that an IPv6 address has in a URL; refuse what is more than a host."""
    host = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if host.count(":") == 1 or "/" in host:  # an IPv6 address has more colons
        allowed = "a host name or an IP address alone; the port is a setting of its own"
        raise SettingsError(written, f"{text[:100]!r} is not allowed", source=source, allowed=allowed)

    return host


def _refuse_unusable_id(run_id: str, source: str, written: str) -> None:
    """Refuse what no folder can be called, before the aggregator does: it could not tell the source."""
    try:
        safe_run_id(run_id)
    except ValueError:
        problem = f"{run_id[:100]!r} cannot be the name of a run's folder"
        raise SettingsError(written, problem, source=source, allowed=RUN_ID_ALLOWED) from None


def _refuse_cut_expressions(patterns: tuple[str, ...], text: str, source: str, written: str) -> None:
    """Refuse a comma-separated list in which a comma may belong to a regular expression.

    The parts of `re:sk-[a-z]{3,5}` are valid patterns that mask nothing: the secret would leak without a word.
    """
    for pattern, following in itertools.pairwise(patterns):
        if pattern.startswith("re:") and not following.startswith(("re:", "!")):
            problem = f"{text!r}: the comma after {pattern!r} may be part of that regular expression"
            raise SettingsError(written, problem, source=source, allowed=_json_form(text, patterns))


def _json_form(text: str, patterns: tuple[str, ...]) -> str:
    import json

    return f"a JSON list: {json.dumps([text])} if it is, {json.dumps(patterns)} if not"


def _content_of(path: Path) -> bytes | None:
    """Return the content of a file; None if there is none, or no way to see whether there is.

    Raises:
        SettingsError: there is one that cannot be read.
    """
    try:
        return read_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if not _is_visible(path):
            return None

        raise SettingsError(
            path.name, f"cannot be read: {error.strerror}", source=str(path), allowed="a TOML file that you may read"
        ) from error


def _is_visible(path: Path) -> bool:
    """Return whether this user may enter the folder of a file."""
    try:
        path.lstat()
    except OSError:
        return False

    return True


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:  # also other bytes than UTF-8, long numbers, and tables too deep
        raise SettingsError(path.name, f"is not TOML: {error}", source=str(path), allowed="a TOML file") from error


def setting_name(key: str) -> str:
    """Return the name of a setting that may be given by another spelling; any other text as it is."""
    return _ALIASES.get(key, key)


def former_setting(key: str, *, is_variable: bool) -> str | None:
    """Return the spelling here of a setting of traceml-ai; None for any other name.

    Args:
        key: its argument of `init`, or its variable in lower case and without the prefix.
        is_variable: name the variable, not the argument.
    """
    renamed = _RENAMED.get(key)
    if renamed is not None:
        return f"TRACEML_{renamed.upper()}" if is_variable else f"`{renamed}`"

    return _ELSEWHERE.get(key)
