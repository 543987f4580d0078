"""The newest operation of this rank in each process group, by torch's flight recorder."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from traceml.clock import own_time as time

if TYPE_CHECKING:
    from traceml.database.snapshots.rank_snapshot import GroupSnapshot

__all__ = ["GroupSnapshots", "mesh_coordinates"]

_DUMP_S = 1.0
_AGAIN_S = 10.0
# The recorder of NCCL is its own; where both exist, the general one is empty for NCCL.
_DUMPS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
# A device mesh names the group of a dimension `mesh_NAME`; Megatron has these names.
_MESH_GROUP = "mesh_"
_MEGATRON_GROUPS = {
    "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "DATA_PARALLEL_GROUP": "dp",
    "TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "CONTEXT_PARALLEL_GROUP": "cp",
    "EXPERT_MODEL_PARALLEL_GROUP": "ep",
}
_MAX_DIMENSIONS = 16
_PEER = re.compile(r"(?:->|<-)\s*(\d+)\s*$")


def mesh_coordinates() -> dict[str, int]:
    """Return this rank's place in each dimension of its device meshes, by the group of that dimension."""
    if not _is_initialized():
        return {}

    me: int = sys.modules["torch.distributed"].get_rank()
    found: dict[str, int] = {}
    for group, _, members in _groups():
        dimension = _dimension(str(getattr(group, "group_desc", "") or ""))
        if dimension and me in members and len(members) > 1 and len(found) < _MAX_DIMENSIONS:
            found[dimension] = members[me]

    return found


def _dimension(description: str) -> str | None:
    if description.startswith(_MESH_GROUP) and description != "mesh_default":
        return description.removeprefix(_MESH_GROUP)

    return _MEGATRON_GROUPS.get(description)


class GroupSnapshots:
    """Reads torch's flight recorder, without stacks: those need the GIL, and can hang."""

    def __init__(self) -> None:
        self._dumping: threading.Thread | None = None
        self._is_late = False  # whether the last dump had not ended in its time
        self._state: object = None
        self._counted: tuple[int, ...] = ()  # as of that state
        self._entries: list[Mapping[str, Any]] = []
        self._read_s = 0.0

    def state(self) -> object:
        """Return what changes when a collective is issued and, where that takes 2 us, when one ends."""
        if not _is_initialized():
            return None

        if _queries_events():
            return _sequences()

        if self._is_dumping:  # it may keep the recorder's lock
            counted = _sequences()
            return self._state if counted == self._counted else counted

        return tuple(dump(False, False) for dump in _dumps())

    def read(self) -> tuple[GroupSnapshot, ...]:
        """Return the newest operation by group; empty without groups, and while it is not known."""
        if not _is_initialized():
            return ()

        state, now_s = self.state(), time.monotonic()
        if _queries_events() or self._is_late or state != self._state or now_s - self._read_s > _AGAIN_S:
            self._state, self._counted, self._read_s = state, _sequences(), now_s
            self._entries = self._dump()

        if self._is_late:
            return ()

        groups = _groups()
        world_size = max(_launched(), *(len(members) for _, _, members in groups))
        return tuple(self._group(*each, world_size) for each in groups)

    @property
    def _is_dumping(self) -> bool:
        """Whether a dump has not ended in its time: it may never."""
        return self._dumping is not None and self._dumping.is_alive()

    def _dump(self) -> list[Mapping[str, Any]]:
        """Return the recorder's entries; on a thread that may be lost, as a dump queries events of the device."""
        self._is_late = self._is_dumping
        if self._is_late:
            return []

        found: list[Mapping[str, Any]] = []
        self._dumping = threading.Thread(
            target=_read_entries, args=(found,), name="traceml-flight-recorder", daemon=True
        )
        self._dumping.start()
        self._dumping.join(_DUMP_S)
        self._is_late = self._is_dumping
        return [] if self._is_late else found

    def _group(self, group: Any, name: str, members: Mapping[int, int], world_size: int) -> GroupSnapshot:
        from traceml.database.snapshots.rank_snapshot import GroupSnapshot  # a healthy rank does not pay for it

        description = str(getattr(group, "group_desc", "") or "")
        known: dict[str, Any] = {"name": _shown_name(name, description)}
        if len(members) < world_size:
            known["members"] = tuple(sorted(members))

        entries = [each for each in self._entries if str((each.get("process_group") or [""])[0]) == name]
        if entries:
            return GroupSnapshot(**known, **_operation(_awaited(entries)))

        # Point-to-point operations count too in this number, so it is used only where there is no recorder.
        return GroupSnapshot(**known, number=0 if self._entries else _sequence(group))


def _awaited(entries: list[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the newest entry; of several collectives in flight the first, as of DDP's buckets: it is waited for."""
    found, *earlier = sorted(entries, key=lambda each: int(each.get("record_id") or 0), reverse=True)
    for each in earlier:
        if not (_is_in_flight(found) and _is_in_flight(each)) or found.get("is_p2p") or each.get("is_p2p"):
            break

        found = each

    return found


def _is_in_flight(entry: Mapping[str, Any]) -> bool:
    return entry.get("retired") is False and entry.get("state") != "completed"


def _operation(entry: Mapping[str, Any]) -> dict[str, Any]:
    words = str(entry.get("profiling_name", "")).rpartition(":")[2].split()
    is_p2p = entry.get("is_p2p") is True
    peer = _PEER.search(str(entry.get("profiling_name", "")))
    return {
        "number": int(entry.get("p2p_seq_id" if is_p2p else "collective_seq_id") or 0),
        "operation": words[0] if words else "",
        "sizes": tuple(math.prod(size) for size in entry.get("input_sizes") or ()),
        "in_flight": _is_in_flight(entry),
        "is_p2p": is_p2p,
        "peer": int(peer[1]) if is_p2p and peer else None,
    }


def _shown_name(name: str, description: str) -> str:
    if description == "default_pg":
        return ""

    return description if description not in ("", "undefined") else name


def _launched() -> int:
    """Return the number of ranks of the job by its launcher, 0 if not known: a default group may have fewer."""
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if size.isdecimal() else 0


def _sequence(group: Any) -> int:
    try:
        return int(group._get_sequence_number_for_group())
    except Exception:  # noqa: BLE001 - private; it raises before the first collective of some backends
        return 0


def _sequences() -> tuple[int, ...]:
    return tuple(_sequence(group) for group, *_ in _groups())


def _groups() -> list[tuple[Any, str, Mapping[int, int]]]:
    """Return (group, name, global rank -> rank in the group) of all groups of this rank."""
    world: Any = getattr(sys.modules.get("torch.distributed.distributed_c10d"), "_world", None)
    names = dict(getattr(world, "pg_names", {}))
    members = dict(getattr(world, "pg_group_ranks", {}))
    return [(group, str(names.get(group, "")), ranks) for group, ranks in members.items()]


def _dumps() -> list[Any]:
    module = sys.modules.get("torch._C._distributed_c10d")
    return [getattr(module, name) for name in _DUMPS if hasattr(module, name)]


def _queries_events() -> bool:
    """Whether the recorder is that of NCCL, which asks the device: every build of torch for CUDA has it."""
    return hasattr(sys.modules.get("torch._C._distributed_c10d"), _DUMPS[0])


def _read_entries(found: list[Mapping[str, Any]]) -> None:
    for dump in _dumps():
        entries = json.loads(dump(True, False)).get("entries")
        found += [each for each in entries or () if isinstance(each, dict)]


def _is_initialized() -> bool:
    # Another thread may be importing it: then it has not all of its functions yet.
    is_initialized = getattr(sys.modules.get("torch.distributed"), "is_initialized", None)
    return is_initialized is not None and bool(is_initialized())
