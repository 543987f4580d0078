"""Hosts of a launch: names, transports and numbers of workers."""

from __future__ import annotations

import ipaddress
import os
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from traceml.errors import SlurmError, UsageError
from traceml.formatting import plural
from traceml.launch.launcher.hosts.hostfile import is_hostfile, read_hostfile, split_port
from traceml.launch.launcher.hosts.slurm import Allocation, ScontrolError, allocation

__all__ = ["HostSpec", "Transport", "resolve_hosts"]

Transport = Literal["local", "ssh", "srun"]

_SSH_TIMEOUT_S = 30
_LOOPBACK = frozenset({"localhost", "localhost.localdomain", "localhost4", "localhost6", "127.0.0.1", "::1"})


@dataclass(frozen=True, slots=True)
class HostSpec:
    """One host of a launch."""

    name: str  # as the user or Slurm wrote it; for ssh perhaps with a port
    transport: Transport  # how its agent is started: as a child process, by ssh, or as a step of the Slurm job
    workers: int | None = None  # number of workers; None: one per GPU that they see, else `cpu_workers`
    cpu_workers: int | None = None  # number of workers without GPUs; None: one per CPU core
    het_group: int | None = None  # its component of a heterogeneous Slurm job; None: of another job


def resolve_hosts(
    hostnames: Sequence[str] | str | os.PathLike[str],
    workers_per_host: int | Sequence[int] | str,
    ssh_config_file: str | os.PathLike[str] | None,
    environ: Mapping[str, str],
) -> list[HostSpec]:
    """Return the hosts of a launch, in the order of their ranks.

    Args:
        hostnames: names for ssh, perhaps with a port (names of this host are started directly); a hostfile; `slurm`, or
            `auto`: the Slurm allocation, otherwise this host.
        workers_per_host: for all hosts, or for each; `slurm`, or `auto`: the slots of a hostfile, else see `HostSpec`.
        ssh_config_file: configuration that ssh reads instead of the user's.

    Raises:
        UsageError: a name is repeated, there are no hosts, the hostfile has another form, or the numbers do not match.
        SlurmError: Slurm is asked for, and there is no allocation.
    """
    slots: Mapping[str, int | None] = {}
    hostnames = _unwrapped(hostnames)
    if isinstance(hostnames, os.PathLike) or (isinstance(hostnames, str) and is_hostfile(hostnames)):
        slots = read_hostfile(Path(hostnames))
        hostnames = list(slots)

    asked = "slurm" in (hostnames, workers_per_host)
    found = None
    if asked or not _all_here(hostnames):
        try:
            found = allocation(environ)
        except ScontrolError:
            if asked or isinstance(hostnames, str):
                raise

    if asked and found is None:
        which = "hostnames" if hostnames == "slurm" else "workers_per_host"
        raise SlurmError(
            f"{which}='slurm', but this process is in no Slurm allocation (SLURM_JOB_ID is not set). "
            "Start it with sbatch, or under salloc; or name the hosts."
        )

    has_srun = shutil.which("srun", path=environ.get("PATH")) is not None
    if hostnames == "slurm" and not has_srun:
        raise SlurmError("hostnames='slurm', but srun is not on the PATH; name the hosts, such as ['localhost']")

    names = _names(hostnames, found)
    numbers = [slots.get(n) for n in names] if workers_per_host == "auto" else _numbers(workers_per_host, names)
    specs = []
    for name, number in zip(names, numbers, strict=True):
        default = found.workers.get(name) if found else None
        if workers_per_host == "slurm" and found and name not in found.workers:
            raise SlurmError(f"workers_per_host='slurm', but host {name} is not part of Slurm's job {found.job_id}")

        group = found.groups.get(name) if found else None
        specs.append(
            HostSpec(name, _transport(name, found if has_srun else None, ssh_config_file), number, default, group)
        )

    return specs


def _unwrapped(hostnames: Any) -> Sequence[str] | str | os.PathLike[str]:
    """Return the element of a list of one word that is not a host name: a command line makes a list of it."""
    if isinstance(hostnames, str | os.PathLike):
        return hostnames

    if not isinstance(hostnames, Sequence) or isinstance(hostnames, bytes):
        raise UsageError(f"hostnames={hostnames!r}: give a list of names, a hostfile, 'auto' or 'slurm'")

    if len(hostnames) != 1 or not isinstance(hostnames[0], str):
        return hostnames

    word = hostnames[0]
    return word if word in ("auto", "slurm") or ("/" in word and is_hostfile(word)) else hostnames


def _names(hostnames: Sequence[str] | str, found: Allocation | None) -> list[str]:
    if isinstance(hostnames, str):
        if hostnames not in {"auto", "slurm"}:
            raise UsageError(
                f"hostnames={hostnames!r}: give a list of names, a hostfile that exists, 'auto' or 'slurm' "
                f"(did you mean {hostnames.replace(',', ' ').split()!r}?)"
            )

        return list(found.workers) if found else ["localhost"]

    names = list(hostnames)
    if not names:
        raise UsageError("hostnames is empty: name at least one host, for example 'localhost'")

    for name in names:
        # a name that starts with a dash would be an option of ssh
        if not isinstance(name, str) or not name or name.startswith("-") or not name.isprintable() or " " in name:
            raise UsageError(f"hostnames has {name!r}, which is not a host name")

        split_port(name)

    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(
            f"hostnames has {', '.join(repeated)} more than once. "
            "Name each host once, and give it more workers with workers_per_host."
        )

    return names


def _numbers(workers_per_host: int | Sequence[int] | str, names: Sequence[str]) -> list[int | None]:
    if isinstance(workers_per_host, str):
        if workers_per_host not in {"auto", "slurm"}:
            raise UsageError(
                f"workers_per_host={workers_per_host!r}: give a number, a list of numbers, 'auto' or 'slurm'"
            )

        return [None] * len(names)

    numbers: list[Any] = [workers_per_host] * len(names)
    if isinstance(workers_per_host, Sequence):
        numbers = list(workers_per_host)

    if len(numbers) != len(names):
        given, hosts = plural(len(numbers), "number"), plural(len(names), "host")
        raise UsageError(f"workers_per_host has {given} for {hosts} ({', '.join(names)})")

    for number in numbers:
        if type(number) is not int or number < 1:
            raise UsageError(f"workers_per_host has {number!r}: each host gets at least 1 worker")

    return list(numbers)


def _transport(name: str, found: Allocation | None, ssh_config_file: str | os.PathLike[str] | None) -> Transport:
    if found and name in found.workers:
        return "srun"

    if split_port(name)[1] is not None:  # an sshd that was chosen, also of this host
        return "ssh"

    own = socket.gethostname()
    if name not in {own, own.partition(".")[0]} and not _is_here(name):
        return "ssh"

    if ssh_config_file is not None and _is_another_host(name, os.fspath(ssh_config_file)):
        return "ssh"

    return "local"


def _is_another_host(name: str, ssh_config_file: str) -> bool:
    """Return whether the user's ssh configuration maps a name of this host to another one."""
    try:
        output = subprocess.run(
            ["ssh", "-F", ssh_config_file, "-G", name],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SSH_TIMEOUT_S,
            check=False,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):  # no ssh: then it is this host
        return False

    for line in output.splitlines():
        key, _, value = line.partition(" ")
        if key == "hostname":
            return value != name and not _is_here(value)

    return False


def _all_here(hostnames: Sequence[str] | str) -> bool:
    return not isinstance(hostnames, str) and all(isinstance(name, str) and _is_here(name) for name in hostnames)


def _is_here(name: str) -> bool:
    """Return whether a name or an address surely is this host's; names are not resolved."""
    if name.lower() in _LOOPBACK:
        return True

    try:
        address = ipaddress.ip_address(name)
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((name, 0))  # only addresses of our own interfaces can be bound
    except (ValueError, OSError):
        return False

    return True
