"""The smallest group of ranks that explains slow ones."""

from __future__ import annotations

import pytest

from traceml.diagnosis.facts.topology import Topology

RANKS = range(64)
# Hosts of 8 ranks, 2 hosts per leaf switch, 4 leaves below 2 spines; 4 stages of 16 ranks, 2 replicas of 8 in each.
CLUSTER = Topology(
    hosts={rank: f"gpu-{rank // 8:03}" for rank in RANKS},
    domains={8 * host: f"nv{host // 4}" for host in range(8)},
    switches={rank: (f"leaf{rank // 16}", f"spine{rank // 32}") for rank in RANKS},
    mesh={rank: {"pp": rank % 16 // 4, "tp": rank % 4} for rank in RANKS},
)


@pytest.mark.parametrize(
    ("slow", "words", "also"),
    [
        (range(8, 16), "all 8 ranks of host gpu-001", ()),
        (range(16, 32), "all 16 ranks of switch leaf1", ()),
        (range(17, 32), "15 of 16 ranks of switch leaf1", ()),
        (range(32), "all 32 ranks of NVLink domain nv0", ("switch spine0",)),
        ([rank for rank in RANKS if rank % 16 // 4 == 3], "all 16 ranks of pipeline stage 3", ()),
        ([rank for rank in RANKS if rank % 4 == 2], "all 16 ranks of tensor-parallel rank 2", ()),
    ],
)
def test_the_smallest_group_is_named(slow, words, also):
    """A host before its switch; groups of the same ranks are told together."""
    group = CLUSTER.smallest_group(list(slow), RANKS)

    assert group is not None
    assert (group.words, group.also) == (words, also)


@pytest.mark.parametrize(
    "slow",
    [
        pytest.param([9], id="one rank"),
        pytest.param([8, 9, 10, 11, 12, 13, 14], id="7 of 8 of a host"),
        pytest.param([7, 8], id="neighbors on two hosts"),
        pytest.param([*range(8), 8], id="a host and a rank of the next"),
        pytest.param(range(64), id="all"),
        pytest.param([*range(8), *range(56, 64)], id="two hosts without a common switch"),
    ],
)
def test_other_ranks_are_no_group(slow):
    """A group with many ranks that are not slow is not to blame, nor one that has all ranks."""
    assert CLUSTER.smallest_group(list(slow), RANKS) is None


def test_ranks_that_were_not_seen_do_not_count():
    """Of a host with two lost ranks the other six are all that was compared."""
    seen = [rank for rank in RANKS if rank not in (8, 9)]

    group = CLUSTER.smallest_group(range(10, 16), seen)

    assert group is not None
    assert group.words == "all 6 ranks of host gpu-001"


def test_where_nothing_is_known_there_is_no_group():
    """Ranks without a place are not in one together."""
    assert Topology().smallest_group([1, 2], range(4)) is None
    assert Topology(hosts={0: "a", 1: "a"}).smallest_group([0, 2], range(4)) is None


def test_places_come_from_rows_of_ranks():
    """Each rank tells its switches and its place in the mesh; one rank of a host tells the NVLink domain."""
    topology = Topology(hosts={rank: f"h{rank // 2}" for rank in range(8)})
    for rank in range(8):
        topology.info(rank, {"kind": "process", "switches": [f"leaf{rank // 4}", "spine"]})
        topology.info(rank, {"kind": "mesh", "coordinates": {"dp_shard": rank % 2, "mine": rank // 4}})

    topology.info(0, {"kind": "nvlink", "domain": "c0ffee.1"})
    topology.info(3, {"kind": "process"})  # outside of Slurm, and without a file

    assert topology.domains == {0: "c0ffee.1"}
    assert topology.switches[3] == ()
    stage = topology.smallest_group([1, 3, 5, 7], range(8))
    leaf = topology.smallest_group([4, 5, 6, 7], range(8))
    assert stage is not None
    assert leaf is not None
    assert stage.words == "all 4 ranks of data-parallel shard 1"
    assert (leaf.words, leaf.also) == ("all 4 ranks of switch leaf1", ("mesh coordinate mine=1",))
