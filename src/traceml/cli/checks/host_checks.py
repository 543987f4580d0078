"""Checks that `traceml doctor --hostnames` prints of other hosts."""

from __future__ import annotations

from collections.abc import Iterator

from traceml.cli.checks.local_checks import Check
from traceml.formatting import bytes_text, duration_text, ms_text
from traceml.launch.launcher.preflight import HostFacts, Preflight, slow_hosts

__all__ = ["host_checks"]

# Logs of hosts whose clocks differ by more cannot be compared.
_CLOCK_S = 0.1


def host_checks(found: Preflight) -> Iterator[Check]:
    """Yield a check per host, and those of all hosts together."""
    for host in found.hosts:
        yield _trouble(host) if host.trouble else _host(host, found)

    usable = [host for host in found.hosts if not host.trouble]
    if len(usable) > 1:
        yield _versions(usable)

    if found.trouble:
        hint = "all hosts must reach the first one at any port: check firewalls and GLOO_SOCKET_IFNAME"
        yield Check("network", "broken", f"no process group over these hosts: {found.trouble}", hint)

    for link in found.links:
        text = f"{ms_text(link.latency_ms)}, {link.megabytes_per_s:.0f} MB/s"
        yield Check("network", "ok", f"{' - '.join(link.hosts)}: {text}")

    if found.all_reduce_ms is not None:
        yield Check("all-reduce", "ok", f"16 MiB over {len(usable)} hosts in {ms_text(found.all_reduce_ms)} (gloo)")

    for name, why in slow_hosts(found):
        yield Check("slow", "note", f"{name}: {why}", "in data-parallel training all others wait for it")


def _trouble(host: HostFacts) -> Check:
    said = f" ({host.words[-1].strip()})" if host.words else ""
    return Check(host.name, "broken", f"{host.trouble}{said}", host.advice)


def _host(host: HostFacts, found: Preflight) -> Check:
    facts = host.facts
    parts = [f"Python {facts['python']}, torch {facts['torch']}", _devices(facts["gpus"], facts["gpu_tflops"])]
    parts.append(f"{facts['cores']} cores, {facts['cpu_gflops']:.0f} GFLOP/s, load {facts['load']:.1f}")
    parts.append(f"{bytes_text(facts['memory_free_bytes'])} free, answered in {duration_text(host.connect_s)}")
    offset_s = found.clock_offsets_s.get(host.name, 0.0)
    if abs(offset_s) <= _CLOCK_S:
        parts += [f"clock {1e3 * offset_s:+.1f} ms"] if host.name in found.clock_offsets_s else []
        return Check(host.name, "ok", "; ".join(parts))

    parts.append(f"clock {offset_s:+.3f} s against the first host")
    hint = "set the clock by NTP: logs of these hosts cannot be compared (traceml corrects its own times)"
    return Check(host.name, "note", "; ".join(parts), hint)


def _devices(names: list[str], tflops: list[float]) -> str:
    if not names:
        return "no GPU"

    kinds = " and ".join(f"{names.count(kind)} x {kind}" for kind in dict.fromkeys(names))
    return f"{kinds}, {min(tflops):.0f} TFLOP/s (bf16)"


def _versions(hosts: list[HostFacts]) -> Check:
    """Different torch versions often cannot form a group; different Pythons cannot read each other's functions."""
    for what, places in (("Python", 2), ("torch", 3)):
        by_version: dict[str, list[str]] = {}
        for host in hosts:
            version = ".".join(str(host.facts[what.lower()]).split(".")[:places])
            by_version.setdefault(version, []).append(host.name)

        if len(by_version) > 1:
            versions = "; ".join(f"{version} on {', '.join(names)}" for version, names in by_version.items())
            return Check("versions", "broken", f"{what} differs: {versions}", f"install the same {what} everywhere")

    return Check("versions", "ok", "the same Python and torch on all hosts")
