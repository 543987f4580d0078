"""Traces of hybrid-parallel jobs, made by running their schedule: 1F1B, interleaved with several chunks per stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
import pyarrow.parquet

FORWARD_S, BACKWARD_S, TRANSFER_S, SMALL_S = 0.1, 0.2, 0.001, 0.01

# (kind, dp_rank, stage, step, micro_batch) -> seconds
Seconds = Callable[[str, int, int, int, int], float]


def usual_s(kind: str, dp_rank: int, stage: int, step: int, micro_batch: int) -> float:
    """Return the same time for all operations of a kind."""
    return {"forward-compute": FORWARD_S, "backward-compute": BACKWARD_S}.get(kind, SMALL_S)


def slow_worker(kind: str, dp_rank: int, stage: int, step: int, micro_batch: int) -> float:
    """Return the usual duration, twice as long for computation of one worker."""
    factor = 2 if "compute" in kind and (dp_rank, stage) == (1, 2) else 1
    return factor * usual_s(kind, dp_rank, stage, step, micro_batch)


@dataclass
class GeneratedJob:
    """A job whose steps are run by the schedule, one event after the other.

    Attributes:
        records_idle: whether the profiler of a job with several chunks records transfers that were never started.
    """

    dp: int = 2
    pp: int = 4
    chunks: int = 1
    micro_batches: int = 8
    steps: int = 3
    overlap: bool = False
    records_idle: bool = True
    seconds: Seconds = usual_s
    rows: list[dict[str, object]] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)

    def run(self) -> GeneratedJob:
        for step in range(self.steps):
            self._run_step(step)

        return self

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write trace and layout; return their paths."""
        trace, meta = folder / "trace.parquet", folder / "meta.yaml"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(self.rows), trace)
        meta.write_text(
            f"trial_name: generated\ndp_size: {self.dp}\npp_size: {self.pp}\ntp_size: 1\nvpp_size: {self.chunks}\n"
            f"world_size: {self.dp * self.pp}\n"
        )
        return trace, meta

    def _run_step(self, step: int) -> None:
        self._numbers: dict[tuple[int, int, str], int] = {}
        gathered = {
            (stage, chunk): self._collective(
                "params-all-gather", step, [stage], {(dp_rank, stage): 0.0 for dp_rank in self._ranks}, chunk
            )
            for stage in range(self.pp)
            for chunk in range(self.chunks)
        }
        self._ends: dict[tuple[int, int], float] = {}
        self._last: dict[tuple[int, int, int], float] = {}
        for dp_rank in self._ranks:
            self._run_pipeline(step, dp_rank, gathered)

        self._run_end(step)

    @property
    def _ranks(self) -> range:
        return range(self.dp)

    def _run_pipeline(self, step: int, dp_rank: int, gathered: dict[tuple[int, int], float]) -> None:
        programs = {stage: self._program(stage) for stage in range(self.pp)}
        at = dict.fromkeys(programs, 0.0)
        sends: list[tuple[float, float, str, dict[str, int]]] = []
        ran: dict[tuple[int, str], list[float]] = {}  # ends of the stage's computations of a kind
        arrived: dict[tuple[str, int, int], float] = {}  # (direction, global chunk, micro-batch) -> sent at
        while any(programs.values()):
            for stage, program in programs.items():
                while program:
                    direction, chunk, micro_batch = program[0]
                    place = chunk * self.pp + stage
                    source = place - 1 if direction == "forward" else place + 1
                    inside = 0 <= source < self.pp * self.chunks
                    if inside and (direction, source, micro_batch) not in arrived:
                        break

                    program.pop(0)
                    ready = at[stage]
                    earlier = ran.setdefault((stage, direction), [])
                    posted = earlier[-1] if earlier else self._first_post(direction, ran, stage)
                    facts = {"step": step, "dp_rank": dp_rank, "stage": stage}
                    if inside:
                        sent = arrived[direction, source, micro_batch]
                        end = max(sent, posted) + TRANSFER_S
                        self._add(f"{direction}-recv", posted, end, **facts)
                        sends.append((sent, end, direction, {**facts, "stage": source % self.pp}))
                        ready = max(ready, end)
                    elif self.chunks > 1 and self.records_idle and earlier:
                        self._add(f"{direction}-recv", posted, posted, **facts)  # recorded, never started

                    if direction == "forward" and micro_batch == 0:
                        ready = max(ready, gathered[stage, chunk])

                    kind = f"{direction}-compute"
                    seconds = self.seconds(kind, dp_rank, stage, step, micro_batch)
                    at[stage] = ready + seconds
                    self._add(kind, ready, at[stage], chunk=chunk, place=place, micro_batch=micro_batch, **facts)
                    earlier.append(at[stage])
                    arrived[direction, place, micro_batch] = at[stage]
                    if direction == "backward":
                        self._last[dp_rank, stage, chunk] = at[stage]

                    target = place + 1 if direction == "forward" else place - 1
                    if self.chunks > 1 and self.records_idle and not 0 <= target < self.pp * self.chunks:
                        sends.append((at[stage], at[stage], direction, facts))

        for start, end, direction, facts in sorted(sends, key=lambda each: each[0]):
            self._add(f"{direction}-send", start, end, **facts)

        for stage, end in at.items():
            self._ends[dp_rank, stage] = end

    def _first_post(self, direction: str, ran: dict[tuple[int, str], list[float]], stage: int) -> float:
        """Return when the first receive is posted: for backward, when the last warm-up forward starts."""
        forwards = ran.get((stage, "forward"), [])
        return forwards[-2] if direction == "backward" and len(forwards) > 1 else 0.0

    def _program(self, stage: int) -> list[tuple[str, int, int]]:
        """Return a stage's computations as (direction, chunk, micro-batch), as Megatron-LM schedules them."""
        count = self.micro_batches * self.chunks
        warm_up = self.pp - stage - 1
        if self.chunks > 1:
            warm_up = 2 * warm_up + (self.chunks - 1) * self.pp

        warm_up = min(warm_up, count)
        forwards = [("forward", *self._virtual(k, forward=True)) for k in range(count)]
        backwards = [("backward", *self._virtual(k, forward=False)) for k in range(count)]
        program = forwards[:warm_up]
        for k in range(count - warm_up):
            program += [forwards[warm_up + k], backwards[k]]

        return program + backwards[count - warm_up :]

    def _virtual(self, k: int, *, forward: bool) -> tuple[int, int]:
        group = self.pp * self.chunks
        chunk = k % group // self.pp if self.chunks > 1 else 0
        micro_batch = k // group * self.pp + k % self.pp if self.chunks > 1 else k
        return (chunk if forward else self.chunks - 1 - chunk), micro_batch

    def _run_end(self, step: int) -> None:
        at = dict(self._ends)
        reduced: dict[int, float] = {}
        if self.overlap:
            for stage in range(self.pp):
                begun = 0.0
                for chunk in reversed(range(self.chunks)):
                    starts = {(d, stage): max(self._last[d, stage, chunk], begun) for d in self._ranks}
                    begun = self._collective("grads-reduce-scatter", step, [stage], starts, chunk)

                reduced[stage] = begun

        for kind in ("gc", "layernorm-grads-all-reduce"):
            for (dp_rank, stage), start in at.items():
                at[dp_rank, stage] = start + self.seconds(kind, dp_rank, stage, step, -1)
                self._add(kind, start, at[dp_rank, stage], step=step, dp_rank=dp_rank, stage=stage)
                if kind == "gc" and self.overlap:
                    at[dp_rank, stage] = max(at[dp_rank, stage], reduced[stage])

        for dp_rank in self._ranks:
            pair = {(dp_rank, stage): at[dp_rank, stage] for stage in {0, self.pp - 1}}
            end = self._collective("embedding-grads-all-reduce", step, sorted({0, self.pp - 1}), pair, -1)
            at.update(dict.fromkeys(pair, end))

        kind = "separate-grads-all-reduce" if self.overlap else "grads-reduce-scatter"
        for stage in range(self.pp):
            for chunk in range(1 if self.overlap else self.chunks):
                own = {(d, stage): at[d, stage] for d in self._ranks}
                at.update(dict.fromkeys(own, self._collective(kind, step, [stage], own, chunk)))

        end = self._collective("optimizer-clip-main-grad", step, list(range(self.pp)), at, -1)
        last = 0.0
        for dp_rank, stage in at:
            done = end + self.seconds("optimizer", dp_rank, stage, step, -1)
            self._add("optimizer", end, done, step=step, dp_rank=dp_rank, stage=stage)
            last = max(last, done)

        self.step_s.append(last)

    def _collective(
        self, kind: str, step: int, stages: list[int], starts: dict[tuple[int, int], float], chunk: int
    ) -> float:
        end = max(starts.values()) + self.seconds(kind, 0, stages[0], step, -1)
        for (dp_rank, stage), start in starts.items():
            self._add(kind, start, end, step=step, dp_rank=dp_rank, stage=stage, chunk=chunk)

        return end

    def _add(
        self, kind: str, start: float, end: float, *, step: int, dp_rank: int, stage: int, chunk: int = -1,
        place: int = -1, micro_batch: int = -1,
    ) -> None:  # fmt: skip
        numbers = self._numbers
        number = numbers.get((dp_rank, stage, kind), 0)
        numbers[dp_rank, stage, kind] = number + 1
        self.rows.append(
            {
                "dp_rank": dp_rank, "stage": stage, "rank": stage * self.dp + dp_rank, "step": 16 + step,
                "optype": kind, "start_ts": start, "duration": end - start, "seq_id": number, "mc": chunk,
                "mb_id": micro_batch, "gmc": place,
            }
        )  # fmt: skip
