"""Checks of hosts before a job: hardware and software, compute speed, and the network between them.

Each host is checked alone first, so that an unusable one does not hide the others; usable ones are then checked
together.

Process: launcher; `probe_host` and `probe_links` run in workers on the hosts, launched like any function.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from traceml.errors import AgentFailedError, TraceMLError

__all__ = ["HostFacts", "LinkFacts", "Preflight", "preflight", "probe_host", "probe_links", "slow_hosts"]

_MATMUL_SIZE, _DEVICE_MATMUL_SIZE, _MATMULS = 1024, 4096, 9
_ROUND_TRIPS, _MESSAGE_BYTES, _REDUCE_BYTES = 20, 16 << 20, 16 << 20
_TIMEOUT_S = 60
_AT_ONCE = 64
# A host, or a network path, below this share of the others' median is slow.
_SLOW_HOST, _SLOW_LINK = 0.7, 0.5


@dataclass(frozen=True, slots=True)
class HostFacts:
    """One host."""

    name: str
    trouble: str = ""  # why it cannot be used; empty if it can
    advice: str = ""
    words: tuple[str, ...] = ()  # the last lines of output of ssh, srun or the host
    facts: dict[str, Any] = field(default_factory=dict)  # the result of `probe_host` on a usable host
    connect_s: float = 0.0  # seconds until the answer, including the import of torch


@dataclass(frozen=True, slots=True)
class LinkFacts:
    """The network between two hosts: half a round trip of 8 bytes in milliseconds, and 16 MiB one way."""

    hosts: tuple[str, str]
    latency_ms: float
    megabytes_per_s: float


@dataclass(frozen=True, slots=True)
class Preflight:
    """Result of a check of hosts."""

    hosts: tuple[HostFacts, ...]
    links: tuple[LinkFacts, ...] = ()  # of a ring over the usable hosts; empty with fewer than two
    # Each host's wall clock minus the first usable host's, in seconds.
    clock_offsets_s: dict[str, float] = field(default_factory=dict)
    # A sum of 16 MiB over all usable hosts, in milliseconds; None with fewer than two.
    all_reduce_ms: float | None = None
    trouble: str = ""  # why hosts that are usable alone do not work together


def preflight(
    hostnames: Sequence[str] | str | Path, *, ssh_config_file: str | Path | None = None, python: str | None = None
) -> Preflight:
    """Check hosts in parallel; takes a few seconds.

    Args:
        hostnames: as for `launch`.
        ssh_config_file: configuration that ssh reads instead of the user's.
        python: the interpreter on the hosts; by default the path of this one.
    """
    from traceml.launch.launcher.hosts.hosts import resolve_hosts

    places = [place.name for place in resolve_hosts(hostnames, 1, ssh_config_file, os.environ)]
    launcher = _ProbeLauncher(ssh_config_file, python)
    with ThreadPoolExecutor(min(len(places), _AT_ONCE)) as pool:
        hosts = tuple(pool.map(launcher.host, places))

    usable = [host.name for host in hosts if not host.trouble]
    if len(usable) < 2:
        return Preflight(hosts)

    try:
        probes = launcher.run(probe_links, usable)
    except Exception as error:  # noqa: BLE001 - any failure of the group is a result
        return Preflight(hosts, trouble=_reason(error))

    links = [LinkFacts((usable[a], usable[b]), ms, rate) for each in probes for a, b, ms, rate in each["links"]]
    offsets = {name: each["clock_offset_s"] for name, each in zip(usable, probes, strict=True)}
    return Preflight(hosts, tuple(links), offsets, max(each["all_reduce_ms"] for each in probes))


def slow_hosts(found: Preflight) -> Iterator[tuple[str, str]]:
    """Yield hosts that would slow the others down, each with the reason."""
    rates = {host.name: host.facts["cpu_gflops"] for host in found.hosts if not host.trouble}
    devices = {host.name: min(host.facts["gpu_tflops"]) for host in found.hosts if host.facts.get("gpu_tflops")}
    for what, unit, table in (("CPU", "GFLOP/s", rates), ("GPU", "TFLOP/s", devices)):
        for name, rate in table.items():
            others = [each for other, each in table.items() if other != name]
            if others and rate < _SLOW_HOST * statistics.median(others):
                yield name, f"its {what} reaches {rate:.3g} {unit}, the others {statistics.median(others):.3g}"

    for link in found.links:
        elsewhere = [each.megabytes_per_s for each in found.links if each is not link]
        if elsewhere and link.megabytes_per_s < _SLOW_LINK * statistics.median(elsewhere):
            text = f"{link.megabytes_per_s:.0f} MB/s between {' and '.join(link.hosts)}"
            yield _slow_end(link, found), f"{text}, {statistics.median(elsewhere):.0f} elsewhere"


def _slow_end(link: LinkFacts, found: Preflight) -> str:
    """Return the host of a slow link whose other link is slow too, or both names if neither is clearly slower."""
    rates = {}
    for name in link.hosts:
        other = [each.megabytes_per_s for each in found.links if name in each.hosts and each is not link]
        rates[name] = min(other, default=link.megabytes_per_s)

    slower, faster = sorted(link.hosts, key=lambda name: rates[name])
    return slower if rates[slower] < _SLOW_LINK * rates[faster] else " or ".join(link.hosts)


class _ProbeLauncher:
    """Launches of probes, which share their agents: torch is imported once per host."""

    def __init__(self, ssh_config_file: str | Path | None, python: str | None) -> None:
        self._ssh_config_file, self._python = ssh_config_file, python

    def host(self, name: str) -> HostFacts:
        began_s = time.monotonic()
        try:
            facts = self.run(probe_host, [name])[0]
        except AgentFailedError as error:
            return HostFacts(name, error.reason, error.advice, tuple(error.words))
        except Exception as error:  # noqa: BLE001 - any failure of a host is a result
            return HostFacts(name, _reason(error))

        return HostFacts(name, facts=facts, connect_s=time.monotonic() - began_s)

    def run(self, function: Any, hostnames: list[str]) -> list[Any]:
        from traceml.launch.launcher.launcher import Launcher

        launcher = Launcher(
            hostnames=hostnames,
            workers_per_host=1,
            ssh_config_file=self._ssh_config_file,
            backend="gloo",
            timeout=_TIMEOUT_S,
            python=self._python,
        )
        result = launcher.run(function, log_handlers=[])
        return [result.index(name, 0) for name in hostnames]


def _reason(error: BaseException) -> str:
    if isinstance(error, AgentFailedError):
        return f"host {error.host}: {error.reason}"  # the advice may be to run this check

    text = str(error).strip() or type(error).__name__
    return text if isinstance(error, TraceMLError) else f"{type(error).__name__}: {text}"


# --- on the hosts ----------------------------------------------------------------------------------------------------


def probe_host() -> dict[str, Any]:
    """Return this host's hardware and software, and its speed of matrix products."""
    import torch

    cores = len(os.sched_getaffinity(0))
    size = _MATMUL_SIZE
    matrix = torch.rand(size, size)
    rates = [2 * size**3 / took_s / 1e9 for took_s in _matmuls(matrix, lambda: None)]
    return {
        "hostname": os.uname().nodename,
        "python": ".".join(map(str, sys.version_info[:3])),
        "executable": sys.executable,
        "torch": torch.__version__,
        "cores": cores,
        "load": os.getloadavg()[0],
        "memory_free_bytes": os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "shm_free_bytes": _free_bytes("/dev/shm"),  # noqa: S108 - only looked at
        "cpu_gflops": statistics.median(rates),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "gpu_tflops": [_device_tflops(index) for index in range(torch.cuda.device_count())],
    }


def probe_links() -> dict[str, Any]:
    """Measure clock offsets, a ring of network paths and an all-reduce; each rank returns its measurements."""
    import torch
    from torch import distributed

    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    offset_s = _clock_offset_s(rank, world_size)
    links = []
    for turn in _turns(world_size):
        distributed.barrier()
        for a, b in turn:
            if rank == a:
                links.append((a, b, *_measure(b)))
            elif rank == b:
                _answer(a)

    data = torch.zeros(_REDUCE_BYTES // 4)
    took_ms = []
    for _ in range(4):
        distributed.barrier()
        began_s = time.perf_counter()
        distributed.all_reduce(data)
        took_ms.append((time.perf_counter() - began_s) * 1e3)

    return {"clock_offset_s": offset_s, "links": links, "all_reduce_ms": statistics.median(took_ms[1:])}


def _matmuls(matrix: Any, wait: Any) -> Iterator[float]:
    """Yield the duration of matrix products in seconds, without the first ones."""
    for number in range(_MATMULS + 2):
        began_s = time.perf_counter()
        matrix @ matrix
        wait()
        if number >= 2:
            yield time.perf_counter() - began_s


def _device_tflops(index: int) -> float:
    import torch

    size = _DEVICE_MATMUL_SIZE
    with torch.cuda.device(index):
        matrix = torch.rand(size, size, device="cuda", dtype=torch.bfloat16)
        return statistics.median(2 * size**3 / s / 1e12 for s in _matmuls(matrix, torch.cuda.synchronize))


def _clock_offset_s(rank: int, world_size: int) -> float:
    """Return this host's wall clock minus rank 0's, measured by the fastest of some exchanges."""
    import torch
    from torch import distributed

    stamp = torch.zeros(1, dtype=torch.int64)
    if rank == 0:
        for peer in range(1, world_size):
            for _ in range(_ROUND_TRIPS):
                distributed.recv(stamp, peer)
                stamp[0] = time.time_ns()
                distributed.send(stamp, peer)

        return 0.0

    best_ns, offset_ns = 1 << 62, 0
    for _ in range(_ROUND_TRIPS):
        sent_ns = time.time_ns()
        distributed.send(stamp, 0)
        distributed.recv(stamp, 0)
        got_ns = time.time_ns()
        if got_ns - sent_ns < best_ns:
            best_ns, offset_ns = got_ns - sent_ns, (sent_ns + got_ns) // 2 - int(stamp)

    return offset_ns / 1e9


def _turns(world_size: int) -> list[list[tuple[int, int]]]:
    """Return the paths of a ring in rounds in which each host has one path at most."""
    ring = [(rank, rank + 1) for rank in range(world_size - 1)]
    turns = [ring[::2], ring[1::2]]
    return [*turns, [(world_size - 1, 0)]] if world_size > 2 else turns


def _measure(peer: int) -> tuple[float, float]:
    """Return latency in milliseconds and bandwidth in MB/s to a peer, which runs `_answer`."""
    import torch
    from torch import distributed

    small, large = torch.zeros(8, dtype=torch.uint8), torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8)
    trips_s, sends_s = [], []
    for _ in range(_ROUND_TRIPS):
        began_s = time.perf_counter()
        distributed.send(small, peer)
        distributed.recv(small, peer)
        trips_s.append(time.perf_counter() - began_s)

    for _ in range(3):
        began_s = time.perf_counter()
        distributed.send(large, peer)
        distributed.recv(small, peer)
        sends_s.append(time.perf_counter() - began_s)

    return statistics.median(trips_s) / 2 * 1e3, _MESSAGE_BYTES / min(sends_s) / 1e6


def _answer(peer: int) -> None:
    import torch
    from torch import distributed

    small, large = torch.zeros(8, dtype=torch.uint8), torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8)
    for _ in range(_ROUND_TRIPS):
        distributed.recv(small, peer)
        distributed.send(small, peer)

    for _ in range(3):
        distributed.recv(large, peer)
        distributed.send(small, peer)


def _free_bytes(folder: str) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0
