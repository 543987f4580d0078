"""`traceml doctor`: check the installation, the settings and other hosts."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.text import Text

from traceml.cli.checks.host_checks import host_checks
from traceml.cli.checks.local_checks import Check, Setting, all_checks, setting_values
from traceml.cli.options.parsing import Metavar, parse
from traceml.cli.options.shared_options import host_names
from traceml.errors import SettingsError, UsageError
from traceml.formatting import printable
from traceml.launch.launcher.preflight import Preflight, preflight
from traceml.renderers.text.viewport import plain_console
from traceml.settings import Config, load

__all__ = ["main"]

_ORDER = ("broken", "note", "ok")  # problems first
_STYLES = {"ok": "green", "note": "yellow", "broken": "bold red"}
EXIT_BROKEN = 3


@dataclass(frozen=True)
class DoctorOptions:
    """Check the installation, settings and hosts; exit with 3 when something is broken."""

    json: bool = False
    """Print the results as JSON and nothing else."""
    settings: bool = False
    """Print only the settings, with their values and sources."""
    backends: bool = False
    """Also check the trackers: versions, credentials (never their values), reachability."""
    hostnames: Annotated[tuple[str, ...], Metavar("HOST")] = ()
    """Also check these hosts, or those of a hostfile, over ssh, or the Slurm nodes (`slurm`) with srun: versions,
    devices, clocks, speeds."""
    ssh_config_file: Annotated[Path | None, Metavar("FILE")] = None
    """Configuration file for ssh, instead of your own."""
    python: Annotated[str | None, Metavar("PATH")] = None
    """The interpreter on those hosts (default: the path of this one)."""


def main(argv: list[str]) -> int:
    """Check everything; return 0, or 3 when something is broken."""
    options = parse(DoctorOptions, argv, prog="traceml doctor")
    if not options.hostnames and (options.ssh_config_file or options.python):
        raise UsageError("--ssh-config-file and --python need --hostnames, which is missing")

    if options.json:
        checks, found = _checks(options)
        report = _as_json(checks, _settings())
        print(json.dumps(report | ({"preflight": asdict(found)} if found else {}), indent=2))
    elif options.settings:
        _print_settings(plain_console(), setting_values(load()))
        checks = []
    else:
        checks = _print_checks(plain_console(), options)

    return EXIT_BROKEN if any(check.state == "broken" for check in checks) else 0


def _checks(options: DoctorOptions) -> tuple[list[Check], Preflight | None]:
    """Return the results of all checks, and what those of other hosts have found."""
    checks = list(all_checks())
    if options.backends and (config := _config()) is not None:
        from traceml.cli.checks.backend_checks import backend_checks

        checks += backend_checks(config)

    hostnames = host_names(options.hostnames)
    if not hostnames:
        return checks, None

    found = preflight(hostnames, ssh_config_file=options.ssh_config_file, python=options.python)
    return [*checks, *host_checks(found)], found


def _config() -> Config | None:
    """Return the settings; None if they are wrong, which the check of the settings reports."""
    try:
        return load()
    except SettingsError:
        return None


def _settings() -> list[Setting]:
    config = _config()
    return [] if config is None else setting_values(config)


def _as_json(checks: list[Check], settings: list[Setting]) -> dict[str, object]:
    return {
        "schema": "traceml.doctor/1",
        "broken": any(check.state == "broken" for check in checks),
        "checks": [asdict(check) for check in checks],
        "settings": {each.name: {"value": each.value, "source": each.source} for each in settings},
    }


def _print_checks(console: Console, options: DoctorOptions) -> list[Check]:
    with console.status("checking") if console.is_terminal else nullcontext():
        checks, _ = _checks(options)

    for check in sorted(checks, key=lambda each: _ORDER.index(each.state)):
        line = (
            Text()
            .append(f"{check.state:<7}", style=_STYLES[check.state])
            .append(f"{check.name:<13} {printable(check.text)}")
        )
        console.print(line, soft_wrap=True)
        if check.hint:
            console.print(Text(f"{'':<21}{printable(check.hint)}", style="dim"), soft_wrap=True)

    if settings := _settings():
        console.print()
        _print_settings(console, settings)

    console.print()
    broken = [check.name for check in checks if check.state == "broken"]
    console.print(f"Broken: {', '.join(broken)}" if broken else "Everything that traceml needs is available.")
    sys.stdout.flush()
    return checks


def _print_settings(console: Console, settings: list[Setting]) -> None:
    width = max(len(each.name) for each in settings)
    values = min(max(len(each.value) for each in settings), 40)
    console.print(Text(f"{'setting':<{width}}  {'value':<{values}}  from", style="dim"))
    for each in settings:
        own = each.source != "default"
        line = f"{each.name:<{width}}  {each.value:<{values}}  {each.source}"
        console.print(Text(line, style="" if own else "dim"), soft_wrap=True)
