"""Switches above a host, from Slurm's variables and from files in the format of topology.conf."""

from __future__ import annotations

from pathlib import Path

import pytest

from traceml.recorder.identity import identify
from traceml.recorder.network_topology import switches_above
from traceml.recorder.recorder_facts import process_facts
from traceml.settings import Config

_TREE = """
# two leaves below one spine
SwitchName=leaf1 Nodes=gpu[001-032,040],login
switchname=leaf2 nodes=gpu[33-39]-ib,gpu[041-064] LinkSpeed=100
SwitchName=spine Switches=leaf[1-2]  # the top
SwitchName=other Nodes=cpu[0-9]
SwitchName=rows \\
  Nodes=rack[0-3]_blade[0-15],\\
rack[08-120]
"""


def slurm(address: str, pattern: str) -> dict[str, str]:
    return {"SLURM_TOPOLOGY_ADDR": address, "SLURM_TOPOLOGY_ADDR_PATTERN": pattern}


@pytest.mark.parametrize(
    ("environ", "switches"),
    [
        (slurm("spine.leaf7.gpu041", "switch.switch.node"), ["leaf7", "spine"]),
        (slurm("s[0-3].s12.gpu041", "switch.switch.node"), ["s12", "s[0-3]"]),
        (slurm("leaf7.gpu041.example.org", "switch.node"), ["leaf7"]),
        (slurm("block2.gpu041", "block.node"), ["block2"]),
        (slurm("gpu041", "node"), []),
        (slurm("gpu041", "switch.switch.node"), []),
        ({"SLURM_TOPOLOGY_ADDR": "leaf7.gpu041"}, ["leaf7"]),
        ({}, []),
    ],
)
def test_slurm_tells_the_switches_from_the_top_down(environ, switches):
    """They are returned from the leaf up, without the node; none where there is no tree."""
    assert switches_above("gpu041", environ) == switches


@pytest.mark.parametrize(
    ("host", "switches"),
    [
        ("gpu001", ["leaf1", "spine"]),
        ("gpu032", ["leaf1", "spine"]),
        ("gpu040.cluster.example.org", ["leaf1", "spine"]),
        ("login", ["leaf1", "spine"]),
        ("gpu35-ib", ["leaf2", "spine"]),
        ("gpu064", ["leaf2", "spine"]),
        ("cpu7", ["other"]),
        ("rack3_blade12", ["rows"]),
        ("rack0_blade0", ["rows"]),
        ("rack09", ["rows"]),
        ("rack110", ["rows"]),
        ("gpu033", []),
        ("gpu1", []),
        ("gpu0001", []),
        ("cpu10", []),
        ("rack4_blade1", []),
        ("rack3_blade16", []),
        ("rack3_blade", []),
        ("rack9", []),
        ("elsewhere", []),
    ],
)
def test_a_file_is_read_as_slurm_reads_it(tmp_path: Path, host, switches):
    """Ranges with and without leading zeros, several in a name, several names, comments, entries in any case."""
    (tmp_path / "topology.conf").write_text(_TREE)

    assert switches_above(host, slurm("wrong.node", "switch.node"), tmp_path / "topology.conf") == switches


def test_switches_in_a_cycle_end(tmp_path: Path):
    """A file with a mistake does not keep a rank from starting."""
    file = tmp_path / "topology.conf"
    file.write_text("SwitchName=a Nodes=n1 Switches=b\nSwitchName=b Switches=a\n")

    assert len(switches_above("n1", {}, file)) == 8


def test_files_that_are_no_topology_are_refused(tmp_path: Path):
    """The recorder logs the error, and goes on without switches."""
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with (tmp_path / "large").open("wb") as large:
        large.truncate((16 << 20) + 1)

    with pytest.raises(UnicodeDecodeError):
        switches_above("n1", {}, tmp_path / "binary")

    with pytest.raises(ValueError, match="16 MiB"):
        switches_above("n1", {}, tmp_path / "large")

    with pytest.raises(FileNotFoundError):
        switches_above("n1", {}, tmp_path / "missing")


def test_a_rank_tells_its_switches_with_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    """From the file of the settings; a file that cannot be read is logged, and costs nothing else."""
    monkeypatch.setattr("socket.gethostname", lambda: "gpu041")
    file = tmp_path / "topology.conf"
    file.write_text(_TREE)
    config = Config(topology_file=file)

    assert process_facts(identify(config), config)["switches"] == ["leaf2", "spine"]

    config = Config(topology_file=tmp_path / "missing")
    facts = process_facts(identify(config), config)

    assert "switches" not in facts
    assert facts["cores"] > 0
    assert "the switches above this host are not known" in caplog.text
