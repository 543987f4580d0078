"""Topology of a job: the groups of ranks that share hardware or a part of the model.

A rule that has found slow ranks asks for the smallest group that explains them: nearly all of its ranks are among them,
and no other rank is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import msgspec
from msgspec.structs import asdict

from traceml.database.info_kinds import InfoKind
from traceml.formatting import count_text

__all__ = ["RankGroup", "Topology"]

MAX_ABSENT = 0.1
"""A group is to blame if at most this share of its ranks is not among the slow ones."""

_MESH_WORDS = {
    "pp": "pipeline stage",
    "pipeline": "pipeline stage",
    "stage": "pipeline stage",
    "dp": "data-parallel replica",
    "dp_replicate": "data-parallel replica",
    "replicate": "data-parallel replica",
    "dp_shard": "data-parallel shard",
    "fsdp": "data-parallel shard",
    "tp": "tensor-parallel rank",
    "cp": "context-parallel rank",
    "ep": "expert-parallel rank",
}
_DIVIDE_SEQUENCES = frozenset({"cp", "sp", "context", "sequence", "ulysses", "ring"})
"""Dimensions, or parts of the name of a flattened one (`dp_shard_cp`), whose ranks have parts of the same batch."""
_DIVIDE_MODELS = frozenset({"tp", "tensor", "pp", "pipeline", "stage"})
"""Likewise, of ranks that have parts of a model, and the same batch."""
_Key = Callable[[int], str | int | None]
_NOWHERE: Mapping[str, int] = {}


class RankGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Ranks that share something."""

    level: str  # `host`, `nvlink`, `switch` or `mesh`
    name: str  # its name in words, such as `host gpu-041` or `pipeline stage 3`
    size: int  # number of its ranks in the window
    slow: int  # number of them that are slow
    also: tuple[str, ...] = ()  # names of other groups of the same ranks

    @property
    def words(self) -> str:
        """The slow ranks in words: `all 8 ranks of host gpu-041`, `31 of 32 ranks of switch leaf7`."""
        some = "all" if self.slow == self.size else f"{count_text(self.slow)} of"
        return f"{some} {count_text(self.size)} ranks of {self.name}"

    def evidence(self) -> dict[str, Any]:
        """Return the group as a finding has it."""
        return {"words": self.words, **asdict(self)}


class Topology(msgspec.Struct, kw_only=True):
    """Places of ranks, as far as they have reported them."""

    hosts: dict[int, str] = {}  # rank -> host
    domains: dict[int, str] = {}  # rank that reported it for its host -> NVLink domain
    switches: dict[int, tuple[str, ...]] = {}  # rank -> switches above its host, the leaf first
    mesh: dict[int, dict[str, int]] = {}  # rank -> dimension of the device mesh -> coordinate

    def info(self, rank: int, row: Mapping[str, Any]) -> None:
        """Take a row of the `info` log: `process`, `mesh` and `nvlink` rows are used."""
        kind = row.get("kind")
        if kind == InfoKind.PROCESS:
            self.switches[rank] = tuple(str(name) for name in row.get("switches") or ())
        elif kind == InfoKind.MESH and isinstance(row.get("coordinates"), Mapping):
            self.mesh[rank] = {str(name): at for name, at in row["coordinates"].items() if isinstance(at, int)}
        elif kind == InfoKind.NVLINK and row.get("domain"):
            self.domains[rank] = str(row["domain"])

    @property
    def divides_sequences(self) -> bool:
        """Whether ranks divide the sequences of a batch among them (context or sequence parallelism)."""
        return any(_is_one_of(_DIVIDE_SEQUENCES, dimension) for mesh in self.mesh.values() for dimension in mesh)

    def with_own_batches(self, ranks: Collection[int]) -> list[int]:
        """Return the ranks to which a batch belongs: of those that divide its sequences among them the lowest."""
        lowest: dict[object, int] = {}
        for rank in sorted(ranks):
            lowest.setdefault(self._place_without(_DIVIDE_SEQUENCES, rank), rank)

        return list(lowest.values())

    def readers(self, world_size: int) -> int:
        """Return how many ranks read samples of their own: those that divide a model, or sequences, read the same."""
        shared = _DIVIDE_SEQUENCES | _DIVIDE_MODELS
        return len({self._place_without(shared, rank) for rank in range(world_size)})

    def _place_without(self, dimensions: Collection[str], rank: int) -> object:
        """Return what tells a rank's place in the mesh, but for some dimensions; of one without a mesh the rank."""
        mesh = self.mesh.get(rank)
        return rank if mesh is None else frozenset(each for each in mesh.items() if not _is_one_of(dimensions, each[0]))

    def smallest_group(self, slow: Collection[int], ranks: Collection[int]) -> RankGroup | None:
        """Return the smallest group that explains slow ranks; None if they are not a group.

        Args:
            ranks: all ranks that were compared, the slow ones among them.
        """
        if len(slow) < 2:
            return None

        found: list[tuple[int, str, str]] = []
        first = next(iter(slow))
        for level, word, key_of in self._levels(first):
            key = key_of(first)
            if key is None or any(key_of(rank) != key for rank in slow):
                continue

            size = sum(key_of(rank) == key for rank in ranks)
            if size < len(ranks) and size - len(slow) <= MAX_ABSENT * size:
                found.append((size, level, f"{word}{key}"))

        if not found:
            return None

        # Of groups of one size the first is the most local: `min` keeps it.
        size, level, name = min(found, key=lambda each: each[0])
        also = tuple(other for count, _, other in found if count == size and other != name)
        return RankGroup(level=level, name=name, size=size, slow=len(slow), also=also)

    def _levels(self, rank: int) -> Iterator[tuple[str, str, _Key]]:
        """Yield the levels at which a rank has a place, the most local first, and how a place's name begins."""
        yield "host", "host ", lambda each: self.hosts.get(each) or None
        domains = {self.hosts[each]: domain for each, domain in self.domains.items() if each in self.hosts}
        yield "nvlink", "NVLink domain ", lambda each: domains.get(self.hosts.get(each, "")) or None
        for above in range(len(self.switches.get(rank, ()))):
            yield "switch", "switch ", lambda each, above=above: _at(self.switches.get(each, ()), above) or None  # type: ignore[misc]

        for dimension in self.mesh.get(rank, {}):
            word = f"{_MESH_WORDS[dimension]} " if dimension in _MESH_WORDS else f"mesh coordinate {dimension}="
            yield "mesh", word, lambda each, dimension=dimension: self.mesh.get(each, _NOWHERE).get(dimension)  # type: ignore[misc]


def _is_one_of(names: Collection[str], dimension: str) -> bool:
    return any(part in names for part in dimension.lower().split("_"))


def _at(names: tuple[str, ...], index: int) -> str | None:
    return names[index] if index < len(names) else None
