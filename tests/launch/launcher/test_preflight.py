"""Looking at hosts before a job: what is said of them, and of real ones."""

from __future__ import annotations

import json
import sys

import pytest

from tests.launch.hosts import Hosts
from traceml.cli.checks.host_checks import host_checks
from traceml.launch.launcher.preflight import HostFacts, LinkFacts, Preflight, slow_hosts

FACTS = {
    "hostname": "n", "python": "3.11.2", "executable": "/usr/bin/python3", "torch": "2.13.0", "cores": 8, "load": 0.1,
    "memory_free_bytes": 1 << 34, "shm_free_bytes": 1 << 33, "cpu_gflops": 100.0, "gpus": [], "gpu_tflops": [],
}  # fmt: skip


def hosts(*facts: dict[str, object]) -> tuple[HostFacts, ...]:
    return tuple(HostFacts(f"n{i}", facts=FACTS | each) for i, each in enumerate(facts))


def ring(*rates: float) -> tuple[LinkFacts, ...]:
    return tuple(LinkFacts((f"n{i}", f"n{(i + 1) % len(rates)}"), 0.1, rate) for i, rate in enumerate(rates))


@pytest.mark.parametrize(
    ("found", "named"),
    [
        (Preflight(hosts({}, {}, {})), []),
        (Preflight(hosts({}, {"cpu_gflops": 60.0}, {})), ["n1"]),
        (Preflight(hosts({}, {"cpu_gflops": 60.0})), ["n1"]),
        (Preflight(hosts({"gpu_tflops": [300.0, 90.0]}, {"gpu_tflops": [300.0, 301.0]})), ["n0"]),
        (Preflight(hosts({}, {}, {}), ring(1000, 990, 1010)), []),
        (Preflight(hosts({}, {}, {}, {}), ring(1000, 90, 100, 1000)), ["n2", "n2"]),
        (Preflight(hosts({}, {}, {}, {}), ring(1000, 90, 1000, 1000)), ["n1 or n2"]),
    ],
)
def test_a_slow_host_is_named(found: Preflight, named: list[str]) -> None:
    """A host is slow against the others, by its processors or by both its network paths; a single slow path is not."""
    assert [name for name, _ in slow_hosts(found)] == named


def test_hosts_that_do_not_fit_together_are_reported() -> None:
    """Versions that differ keep a group from working; a clock that is off only makes logs hard to read."""
    found = Preflight(hosts({}, {"torch": "2.4.0"}), clock_offsets_s={"n0": 0.0, "n1": -3.5})
    checks = {check.name: check for check in host_checks(found)}

    assert checks["n0"].state == "ok"
    assert checks["n1"].state == "note"
    assert "-3.500 s" in checks["n1"].text
    assert checks["versions"].state == "broken"
    assert "2.4.0 on n1" in checks["versions"].text


def test_a_host_in_trouble_hides_nothing_of_the_others() -> None:
    """The reason is printed beside the facts of the other hosts."""
    found = Preflight((HostFacts("gone", "no route to host"), *hosts({})))

    assert [(check.name, check.state) for check in host_checks(found)] == [("gone", "broken"), ("n0", "ok")]


def test_real_hosts_are_looked_at_one_by_one_and_together(hosts: Hosts) -> None:
    """Two that can be used are measured, with the network between them; one that cannot is told with the reason."""
    command = [sys.executable, "-m", "traceml", "doctor", "--json", "--hostnames", "node1", "alias2", "wrongkey"]
    done = hosts.launcher.run(*command, "--ssh-config-file", hosts.ssh_config, check=False)
    told = json.loads(done.stdout)

    assert done.returncode == 3
    usable = {host["name"]: host["facts"] for host in told["preflight"]["hosts"] if not host["trouble"]}
    assert [facts["hostname"] for facts in usable.values()] == ["node1", "node2"]
    assert all(facts["cpu_gflops"] > 0 for facts in usable.values())
    assert [link["hosts"] for link in told["preflight"]["links"]] == [["node1", "alias2"]]
    assert told["preflight"]["links"][0]["megabytes_per_s"] > 0
    assert abs(told["preflight"]["clock_offsets_s"]["alias2"]) < 0.5  # they share a clock
    checks = {check["name"]: check for check in told["checks"]}
    assert checks["wrongkey"]["state"] == "broken"
    assert "permission denied" in checks["wrongkey"]["text"]
    assert checks["alias2"]["state"] == "ok"
