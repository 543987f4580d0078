"""Dependencies between the operations of a training step: order on a worker, transfers between stages, collectives.

All steps and data-parallel ranks have the same operations, so that one step of one rank is the template; collectives
over data-parallel ranks are marked, and the simulation joins the ranks there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from traceml.errors import TraceInvalidError
from traceml.whatif.operations import BACKWARD, COLLECTIVES, COMPUTE, FORWARD, TRANSFERS, JobTrace, Operation

__all__ = ["Dependencies", "Unit", "dependencies_of"]

_CLOCK_ERROR_S = 5e-5
_STREAM = ("params-all-gather", "grads-reduce-scatter")  # one communication stream
_PEERS = {
    "forward-send": ("forward-recv", 1),
    "forward-recv": ("forward-send", -1),
    "backward-send": ("backward-recv", -1),
    "backward-recv": ("backward-send", 1),
}


@dataclass(frozen=True, slots=True)
class Unit:
    """Operations that end together: a computation, both ends of a transfer, or the members of a collective."""

    members: tuple[int, ...]  # indices of the operations
    communicates: bool = False  # whether the members wait for each other before they take their time
    joins_dp_ranks: bool = False  # whether all data-parallel ranks wait for each other


@dataclass(frozen=True, slots=True)
class Dependencies:
    """A step's units in an order in which each comes after all that it waits for."""

    units: tuple[Unit, ...]
    before: tuple[tuple[int, ...], ...]  # operations that each operation waits for, by index


def dependencies_of(job: JobTrace) -> Dependencies:
    """Return what the operations of a job wait for.

    Raises:
        TraceInvalidError: transfers do not match the computations, these have no chunk, or operations wait for each
            other in a cycle.
    """
    step = _Step(job)
    _refuse_unknown_chunks(step)
    for stage in job.stages:
        _order_worker(step, stage)
        _order_collectives(step, stage)
        _order_end(step, stage)

    units = [*_transfer_units(step), *_collective_units(step)]
    inside = {member for unit in units for member in unit.members}
    units += [Unit((index,)) for index in range(len(job.operations)) if index not in inside]
    before = tuple(tuple(sorted(step.before[index])) for index in range(len(job.operations)))
    return Dependencies(tuple(_sorted_units(units, before, job.operations)), before)


def _refuse_unknown_chunks(step: _Step) -> None:
    """Refuse computations whose place in the pipeline is not known: what they send and receive depends on it."""
    count = step.chunks * len(step.stages)
    for operation in step.operations:
        if operation.kind in COMPUTE and not (operation.chunk >= 0 and 0 <= operation.global_chunk < count):
            raise TraceInvalidError(
                f"{operation} has mc {operation.chunk} and gmc {operation.global_chunk}: expected the model chunk on "
                f"its worker (0 or more), and that in the pipeline, which has {max(count, len(step.stages))}"
            )


class _Step:
    """The template: operations of the first step of the first data-parallel rank, and the edges found so far."""

    def __init__(self, job: JobTrace) -> None:
        self.operations = job.operations
        self.start_s = job.start_s[:, 0, 0]
        self.end_s = job.end_s[:, 0, 0]
        self.stages = job.stages
        self.chunks = max(operation.chunk for operation in job.operations) + 1
        self.before: defaultdict[int, set[int]] = defaultdict(set)
        self.idle: list[int] = []  # transfers at the ends of the pipeline, which have no peer
        self.paired: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
        self._of: defaultdict[tuple[int, str], list[int]] = defaultdict(list)
        for index in sorted(range(len(self.operations)), key=self._place):
            self._of[self.operations[index].stage, self.operations[index].kind].append(index)

    def _place(self, index: int) -> tuple[float, int, str]:
        operation = self.operations[index]
        return float(self.start_s[index]), operation.number, operation.kind

    def of(self, stage: int, *kinds: str) -> list[int]:
        """Return a stage's operations of these kinds by start."""
        return sorted((index for kind in kinds for index in self._of[stage, kind]), key=self._place)

    def chain(self, indices: Iterable[int], first: Iterable[int] = ()) -> None:
        """Let each operation wait for the one before it, the first for those of `first`."""
        indices = list(indices)
        for earlier, later in pairwise(indices):
            self.before[later].add(earlier)

        if indices:
            self.before[indices[0]].update(first)


def _order_worker(step: _Step, stage: int) -> None:
    """Order computations as they ran, transfers of a kind as they ran, and connect the two."""
    computations = step.of(stage, *COMPUTE)
    if missing := [kind for kind in COMPUTE if not step.of(stage, kind)]:
        raise TraceInvalidError(f"stage {stage} has no {' and no '.join(missing)}")

    step.chain(computations)
    for kind in TRANSFERS:
        step.chain(step.of(stage, kind))
        _match(step, stage, kind)

    first = next((i for i, index in enumerate(computations) if step.operations[index].kind == BACKWARD), 0)
    if first >= 2:
        # The worker posts its first backward transfers when it starts the last warm-up forward.
        for kind in ("backward-recv", "backward-send"):
            for index in step.of(stage, kind)[:1]:
                step.before[index].add(computations[first - 2])


def _match(step: _Step, stage: int, kind: str) -> None:
    """Connect the transfers of a kind with the computations whose input or output they carry.

    Profilers record transfers that were never started: receives after the last computation, sends before the first, and
    those of the model's first and last chunk. They have no peer.
    """
    direction, end = kind.split("-")
    computations = sorted(step.of(stage, f"{direction}-compute"), key=lambda index: step.operations[index].number)
    transfers = step.of(stage, kind)
    for index, number in _carried(step, stage, kind, computations, transfers):
        computation = computations[number]
        if end == "send":
            step.before[index].add(computation)
        else:
            step.before[computation].add(index)
            if number:
                step.before[index].add(computations[number - 1])

        (step.paired[kind, stage] if _has_peer(step, computation, kind) else step.idle).append(index)


def _carried(
    step: _Step, stage: int, kind: str, computations: Sequence[int], transfers: Sequence[int]
) -> list[tuple[int, int]]:
    """Return the transfers that were started, each with the place of its computation among those of its direction."""
    direction, end = kind.split("-")
    with_peer = [number for number, each in enumerate(computations) if _has_peer(step, each, kind)]
    if not transfers and with_peer:
        raise TraceInvalidError(f"stage {stage} has no {kind}, but {len(with_peer)} {direction}-compute that need one")

    if len(transfers) == len(with_peer):  # the profiler recorded only those that have a peer
        return list(zip(transfers, with_peer, strict=True))

    used = [index for index in transfers if _is_used(step, index, computations, end)]
    step.idle += [index for index in transfers if index not in set(used)]
    skipped = len(computations) - len(used)
    if skipped and (skipped != 1 or stage not in (step.stages[0], step.stages[-1])) and used:
        raise TraceInvalidError(
            f"stage {stage} has {len(used)} {kind} for {len(computations)} {direction}-compute: transfers are missing"
        )

    offset = skipped if end == "recv" else 0
    return list(zip(used, range(offset, len(computations)), strict=False))


def _has_peer(step: _Step, computation: int, kind: str) -> bool:
    """Return whether another stage has the other end of a computation's transfer: the pipeline continues there."""
    return 0 <= step.operations[computation].global_chunk + _PEERS[kind][1] < step.chunks * len(step.stages)


def _is_used(step: _Step, index: int, computations: Sequence[int], end: str) -> bool:
    if end == "recv":
        return bool(step.start_s[index] <= max(step.start_s[each] for each in computations) + _CLOCK_ERROR_S)

    return bool(step.end_s[index] >= min(step.end_s[each] for each in computations) - _CLOCK_ERROR_S)


def _order_collectives(step: _Step, stage: int) -> None:
    """Gather a chunk's parameters before its first forward, and reduce its gradients after its last backward."""
    step.chain(step.of(stage, *_STREAM))
    gathers = {step.operations[index].chunk: index for index in step.of(stage, "params-all-gather")}
    for chunk, index in gathers.items():
        forwards = [each for each in step.of(stage, FORWARD) if step.operations[each].chunk == chunk]
        if forwards:
            step.before[forwards[0]].add(index)

    if not _overlaps(step):
        return

    reductions = {step.operations[index].chunk: index for index in reversed(step.of(stage, "grads-reduce-scatter"))}
    for chunk, index in reductions.items():
        backwards = [each for each in step.of(stage, BACKWARD) if step.operations[each].chunk == chunk]
        if backwards:
            step.before[index].add(max(backwards, key=lambda each: step.end_s[each]))


def _overlaps(step: _Step) -> bool:
    return any(operation.kind == "separate-grads-all-reduce" for operation in step.operations)


def _order_end(step: _Step, stage: int) -> None:
    """Order what follows the last computation: garbage collection, gradients, clipping, optimizer."""
    last = max(step.of(stage, *COMPUTE), key=lambda index: step.end_s[index])
    reductions = step.of(stage, "grads-reduce-scatter")
    overlaps = _overlaps(step)
    collections = step.of(stage, "gc")
    step.chain(collections, first=(last,))
    step.chain(
        [
            *step.of(stage, "layernorm-grads-all-reduce"),
            *step.of(stage, "embedding-grads-all-reduce"),
            *(step.of(stage, "separate-grads-all-reduce") if overlaps else reductions),
            *step.of(stage, "optimizer-clip-main-grad"),
            *step.of(stage, "optimizer"),
        ],
        first=(*(collections[-1:] or [last]), *(reductions[-1:] if overlaps else ())),
    )


def _transfer_units(step: _Step) -> Iterable[Unit]:
    count = len(step.stages)
    for place, stage in enumerate(step.stages):
        for kind in ("forward-send", "backward-send"):
            receiving, delta = _PEERS[kind]
            peer = step.stages[(place + delta) % count]
            sends, receives = step.paired[kind, stage], step.paired[receiving, peer]
            if len(sends) != len(receives):
                raise TraceInvalidError(
                    f"stage {stage} has {len(sends)} {kind}, stage {peer} has {len(receives)} {receiving}: "
                    "the transfers of a step do not match"
                )

            yield from (Unit(pair, communicates=True) for pair in zip(sends, receives, strict=True))

    yield from (Unit((index,), communicates=True) for index in step.idle)


def _collective_units(step: _Step) -> Iterable[Unit]:
    together: defaultdict[str, list[int]] = defaultdict(list)
    for index, operation in enumerate(step.operations):
        if operation.kind in ("embedding-grads-all-reduce", "optimizer-clip-main-grad"):
            together[f"{operation.kind} {operation.number}"].append(index)
        elif operation.kind in COLLECTIVES:
            yield Unit((index,), communicates=True, joins_dp_ranks=True)

    for name, members in together.items():
        yield Unit(tuple(members), communicates=True, joins_dp_ranks=name.split()[0] in COLLECTIVES)


def _sorted_units(
    units: Sequence[Unit], before: Sequence[Sequence[int]], operations: Sequence[Operation]
) -> list[Unit]:
    """Sort the units so that each comes after all that its members wait for."""
    unit_of = {member: number for number, unit in enumerate(units) for member in unit.members}
    waits = [{unit_of[each] for member in unit.members for each in before[member]} for unit in units]
    after: Mapping[int, list[int]] = defaultdict(list)
    for number, earlier in enumerate(waits):
        for each in earlier:
            after[each].append(number)

    missing = [len(earlier) for earlier in waits]
    ready = [number for number, count in enumerate(missing) if not count]
    for number in ready:
        for later in after[number]:
            missing[later] -= 1
            if not missing[later]:
                ready.append(later)

    if len(ready) < len(units):
        stuck = next(number for number, count in enumerate(missing) if count)
        raise TraceInvalidError(
            f"{operations[units[stuck].members[0]]} waits for itself: the trace's order is inconsistent"
        )

    return [units[number] for number in ready]
