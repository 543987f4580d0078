"""Host samples compared with psutil, and fake cgroups."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from traceml.database.schema import HOST
from traceml.samplers import cgroup
from traceml.samplers.host import HostSampler, _disk_names


def as_map(row: tuple[float, ...]) -> dict[str, float]:
    """Return a row as a dict by column."""
    return dict(zip((column.name for column in HOST.columns), row, strict=True))


def psutil_figures() -> dict[str, int]:
    """Return what psutil tells at this moment, by column."""
    memory, net = psutil.virtual_memory(), psutil.net_io_counters(pernic=True)
    disks = [each for name, each in psutil.disk_io_counters(perdisk=True).items() if name.encode() in _disk_names()]
    others = [each for name, each in net.items() if name != "lo"]
    return {
        "memory_used_bytes": memory.total - memory.available,
        "disk_read_bytes": sum(each.read_bytes for each in disks),
        "disk_write_bytes": sum(each.write_bytes for each in disks),
        "net_recv_bytes": sum(each.bytes_recv for each in others),
        "net_sent_bytes": sum(each.bytes_sent for each in others),
    }


def test_figures_are_those_of_the_system() -> None:
    """Memory, disks and network are what psutil tells before or after, or in between; the CPU share is one."""
    sampler = HostSampler()
    before = psutil_figures()
    (row,) = sampler.sample(1, 0)
    after = psutil_figures()
    host = as_map(row)
    sampler.close()

    low, high = sorted(figures.pop("memory_used_bytes") for figures in (before, after))
    if sampler._group is None:
        assert host["memory_total_bytes"] == psutil.virtual_memory().total
        assert low - (256 << 20) < host["memory_used_bytes"] < high + (256 << 20)
    assert 0 <= host["cpu_pct"] <= 100
    assert 1 <= host["cores"] <= len(os.sched_getaffinity(0))
    for name in before:
        assert before[name] <= host[name] <= after[name]


def test_cpu_share_is_of_the_time_between_samples() -> None:
    """Ticks between two samples give the share; no tick between them repeats the last one."""
    sampler = HostSampler()
    sampler._cpu_ticks = lambda: (sampler._busy + 30, sampler._total + 120)  # type: ignore[method-assign]
    assert as_map(sampler.sample(1, 0)[0])["cpu_pct"] == 25.0

    sampler._cpu_ticks = lambda: (sampler._busy, sampler._total)  # type: ignore[method-assign]
    assert as_map(sampler.sample(2, 0)[0])["cpu_pct"] == 25.0
    sampler.close()


def test_a_containers_memory_limit_counts(tmp_path: Path) -> None:
    """The innermost limit of version 2 applies; reclaimable file cache is not use."""
    group = tmp_path / "job" / "step"
    group.mkdir(parents=True)
    (tmp_path / "job" / "memory.max").write_text("1000000\n")
    (tmp_path / "job" / "memory.current").write_text("700000\n")
    (tmp_path / "job" / "memory.stat").write_text("anon 5\ninactive_file 200000\nactive_file 3\n")
    (group / "memory.max").write_text("max\n")

    memory = cgroup.limited_memory(str(tmp_path), "0::/job/step\n")

    assert memory is not None
    assert (memory.limit_bytes, memory.used_bytes()) == (1_000_000, 500_000)
    memory.close()


def test_version_one_limits_count(tmp_path: Path) -> None:
    """Version 1 has other names, and writes no limit as a huge number."""
    root = tmp_path / "memory"
    (root / "job").mkdir(parents=True)
    (root / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (root / "job" / "memory.limit_in_bytes").write_text("2000\n")
    (root / "job" / "memory.usage_in_bytes").write_text("900\n")
    (root / "job" / "memory.stat").write_text("cache 1\ntotal_inactive_file 100\n")

    inside = cgroup.limited_memory(str(tmp_path), "4:memory:/job\n0::/\n")
    outside = cgroup.limited_memory(str(tmp_path), "4:memory:/\n")

    assert inside is not None
    assert (inside.limit_bytes, inside.used_bytes()) == (2000, 800)
    assert outside is None
    inside.close()


def test_a_cpu_quota_counts(tmp_path: Path) -> None:
    """A quota of half a core gives one core; without a quota the affinity counts."""
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert cgroup.cores(str(tmp_path), "0::/\n") == 1

    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cgroup.cores(str(tmp_path), "0::/\n") == len(os.sched_getaffinity(0))
