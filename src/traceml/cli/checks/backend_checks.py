"""Checks of `traceml doctor --backends`: each tracker's library, credentials, address and delivery."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from traceml.cli.checks.local_checks import Check
from traceml.database.store.reader import StoreReader
from traceml.errors import PluginError, RunNotFoundError, StoreError
from traceml.formatting import ms_text
from traceml.renderers.wording import tracker_text
from traceml.run_folder import STORE_NAME
from traceml.runs.find import find_run
from traceml.runs.report.trackers import trackers
from traceml.settings import Config
from traceml.track.delivery.credentials import key_variables, read_key_file
from traceml.track.delivery.probe import ProbeResult, probe
from traceml.track.plugins.plugin_metadata import PluginType
from traceml.track.plugins.plugin_registry import available

__all__ = ["backend_checks"]


def backend_checks(config: Config) -> Iterator[Check]:
    """Yield a check per backend, those of the settings first, and one per tracker of the latest run."""
    wanted = list(config.backend)
    others = sorted(set(available(PluginType.BACKEND)) - set(wanted))
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(4) as pool:
        names = [*wanted, *others]
        run_dir = config.runs_dir.absolute() / "doctor" if config.runs_dir.is_dir() else Path(scratch, "run")
        results = pool.map(lambda name: probe(name, config.backend_options.get(name, {}), run_dir), names)
        for name, result in zip(names, results, strict=True):
            yield _check(name, result, config, is_wanted=name in wanted)

    yield from _deliveries(config.runs_dir)


def _check(name: str, result: ProbeResult, config: Config, *, is_wanted: bool) -> Check:
    options = config.backend_options.get(name, {})
    bad: Literal["broken", "note"] = "broken" if is_wanted else "note"
    if result.missing:
        return Check(name, bad if is_wanted else "ok", *_missing(result.missing, is_wanted=is_wanted))
    if result.error:
        return Check(name, bad, f"cannot be used: {result.error}")

    versions = ", ".join(f"{module} {version}" for module, version in result.versions.items())
    keys, problem = _keys(name, options)
    parts = [part for part in (versions, keys, f"{result.target} {result.answer}".strip()) if part]
    if problem:
        return Check(name, bad, "; ".join([*parts, problem]), "only its owner may read a key file: chmod 600 FILE")
    if result.reaches is False:
        return Check(name, bad, "; ".join(parts), "rows wait in the run until it responds: nothing is lost")
    if config.local_only and not result.is_local:
        return Check(name, bad, "; ".join(parts), "local_only is set: nothing is delivered there")

    return Check(name, "ok", "; ".join(parts))


def _missing(hint: str, *, is_wanted: bool) -> tuple[str, str]:
    what, _, command = hint.partition(": ")
    return (what, command) if is_wanted else ("not installed", command)


def _keys(name: str, options: dict[str, Any]) -> tuple[str, str]:
    """Return the names of the credentials that are set, and what is wrong with a key file."""
    variables = key_variables(name, options)
    if path := options.get("api_key_file"):
        try:
            return f"keys {', '.join(read_key_file(name, Path(str(path))))} in {path}", ""
        except PluginError as error:
            return "", str(error)

    return (f"key{'s' if len(variables) > 1 else ''} {', '.join(variables)} set", "") if variables else ("", "")


def _deliveries(runs_dir: Path) -> Iterator[Check]:
    try:
        run_dir = find_run(None, runs_dir)
        with StoreReader(run_dir / STORE_NAME) as reader:
            section = trackers(run_dir, reader)
    except (RunNotFoundError, StoreError):
        return

    for tracker in section:
        latency = "" if tracker.latency_ms is None else f", {ms_text(tracker.latency_ms)} a batch"
        hint = f"traceml sync {run_dir.name}" if tracker.pending else ""
        text = f"{tracker_text(tracker)}{latency}"
        yield Check("latest run", "note" if tracker.needs_attention else "ok", text, hint)
