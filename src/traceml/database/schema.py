"""Schema of all tables: columns, their meaning, and the byte layout of rows.

A packed table has rows of fixed size: 8-byte little-endian fields, `q` (int64) or `d` (float64). The ring, the wire and
(compressed) the store hold the same bytes. A log has rows of any size: msgpack maps.

A new column begins with one line here, and so does a new phase of a step: layouts, slots and names are generated from
it. The code that fills it is elsewhere: `docs/extending.md` lists the places.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from functools import cached_property
from struct import Struct
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "BLOBS", "DEVICE_PHASES", "DEVICE_STEPS", "EPOCHS", "EVALS", "FINGERPRINTS", "GPU", "HOST", "IMPORTING", "INFO",
    "JOURNALED", "LIMITS", "LINES", "LINE_AFTER_STEPS", "LINE_OTHER", "LINE_OUTSIDE", "LINE_PHASES", "LINE_STARTUP",
    "LINE_THREADS", "LINE_WORKERS", "LOADER_WORKERS", "LOGGED", "LOGS", "LOSSES", "MAX_LOGGED_NUMBERS", "METRICS",
    "MICRO_BATCHES_MASK", "NAMES", "OPEN_SLOTS", "PACKED", "PAUSES", "PHASE_COLUMNS", "PHASE_LABELS", "PROCESS",
    "RELAYED_WHOLE", "SAMPLED_TABLES", "STEPS", "TABLES", "TELEMETRY", "TORCH_MEMORY", "USER_PHASES", "USER_TABLES",
    "Column", "Compiled", "Log", "MetricKind", "Pause", "Phase", "Resource", "Slot", "StepBits", "StepFlag",
    "Table", "in_phase_order", "line_phase_name", "native_layout", "other_ns", "pack_bits", "unpack_bits",
]  # fmt: skip


class Column(NamedTuple):
    """One field of a packed row: its name (with its unit as suffix), struct code, and meaning."""

    name: str
    code: str
    doc: str


@dataclass(frozen=True)
class Table:
    """A packed table: fixed-size rows, kept in the rank in a ring of `capacity` rows until acknowledged."""

    name: str
    columns: tuple[Column, ...]
    capacity: int

    @cached_property
    def struct(self) -> Struct:
        """The row's layout for `pack_into`; native and little-endian are the same bytes on supported machines."""
        return Struct("@" + "".join(column.code for column in self.columns))

    def partial_struct(self, *names: str) -> Struct:
        """Return a layout whose `pack_into` takes some columns, in the table's order; it writes zeros to the others.

        Raises:
            ValueError: a column does not exist, or comes in another order.
        """
        codes = "".join(column.code if column.name in names else "8x" for column in self.columns)
        if tuple(name for name in self.names if name in names) != names:
            raise ValueError(f"{self.name}: {', '.join(names)} are not columns in the table's order")

        return Struct("@" + codes)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the columns, in order."""
        return tuple(column.name for column in self.columns)

    @cached_property
    def index(self) -> dict[str, int]:
        """Position of each column by name."""
        return {name: position for position, name in enumerate(self.names)}

    @cached_property
    def row_bytes(self) -> int:
        """Size of one row."""
        return 8 * len(self.columns)

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """The same layout as a numpy structured dtype (imports numpy: not for the rank)."""
        import numpy as np

        return np.dtype([(column.name, "<i8" if column.code == "q" else "<f8") for column in self.columns])

    @cached_property
    def layout(self) -> list[list[str]]:
        """The layout as sent in the hello: [[name, code], ...]."""
        return [[column.name, column.code] for column in self.columns]


@dataclass(frozen=True)
class Log:
    """A table of variable rows: msgpack maps, kept in the rank in a byte log of `capacity_bytes`."""

    name: str
    capacity_bytes: int

    @property
    def layout(self) -> str:
        """The layout as sent in the hello."""
        return "msgpack"


class Phase(IntEnum):
    """Parts of a step: one line is one phase, its column in `STEPS` and its slot in the flight file.

    The value is the position among the columns and the number of the open slot. New phases go at the end.
    """

    doc: str

    def __new__(cls, value: int, doc: str = "") -> Phase:
        """Make a member."""
        member = int.__new__(cls, value)
        member._value_ = value
        member.doc = doc
        return member

    @property
    def label(self) -> str:
        """The name in reports and exports."""
        return self.name.lower()

    @property
    def column(self) -> str:
        """The column in `STEPS`, and in `DEVICE_STEPS` where it has one."""
        return f"{self.label}_ns"

    INPUT_WAIT = 0, "waiting for the data loader"
    H2D = 1, "copies to the device, as seen by the CPU"
    FORWARD = 2, "outermost model calls"
    BACKWARD = 3, "backward passes, including the wait for other ranks inside them"
    OPTIMIZER = 4, "optimizer steps, GradScaler's step and unscale_, and clipping of gradients"
    COMM = 5, "collectives called from Python by the user's code or an optimizer"
    CHECKPOINT = 6, "saving: torch.save, distributed checkpoints, safetensors"
    USER = 7, "all user phases together; each one is in user_phases"


PHASE_LABELS = tuple(phase.label for phase in Phase)
PHASE_COLUMNS = tuple(phase.column for phase in Phase)
_PHASE_ORDER = tuple(
    phase.label
    for phase in (
        Phase.INPUT_WAIT,
        Phase.H2D,
        Phase.FORWARD,
        Phase.BACKWARD,
        Phase.COMM,
        Phase.OPTIMIZER,
        Phase.CHECKPOINT,
    )
)
"""Phases in the order in which a step runs them; the user's own may be anywhere."""


def in_phase_order(names: Iterable[str]) -> list[str]:
    """Return parts of steps in the order in which charts show them: phases, others by name, and `other`."""
    present = set(names)
    return [
        *(name for name in _PHASE_ORDER if name in present),
        *sorted(present - {*_PHASE_ORDER, "other"}),
        *(["other"] * ("other" in present)),
    ]


OPEN_SLOTS = 32
"""Words of `open_slots` in the flight file. The first 16 are for phases, also for those that do not exist yet."""


class Slot(IntEnum):
    """Words of `open_slots` after the phases; a phase's own word is the start of the open phase, else 0."""

    STEP_START = 16  # monotonic timestamp at which the open step began, 0 without one
    STEP = 17  # number of the open step, -1 without one
    USER_NAME = 18  # id in `names` of the innermost open user phase
    STATE = 19  # FlightState
    EXIT_START = 20  # monotonic timestamp at which the process began to end, 0 before
    HEARTBEAT = 21  # monotonic timestamp of the last time the recorder's thread woke
    RECORDER_THREAD = 22  # the kernel's id of that thread
    # 1 while the model is evaluated, 2 after the training loop, 3 in a step whose optimizer has stepped and that takes
    # far longer than usual, as what follows a loop without a loader; else 0: as of the last heartbeat
    EVALUATING = 23
    SAVED = 24  # number of steps in the last checkpoint that was saved, 0 before the first
    SAVED_IN = 25  # number of its folder, see instrument/checkpoints/checkpoint_marks.py
    ITERATING = 26  # number of data loaders that a loop has not read to their end
    LINE = 27  # id in `names` of the user's line in the last sample, -1 without one
    LINE_PHASE = 28  # the phase of that sample, as in `LINE_PHASES`
    LINE_AT = 29  # monotonic timestamp of that sample, 0 before the first
    TRAINING_THREAD = 30  # Python's id of the training thread as of the last heartbeat, 0 before the first
    LOGGED = 31  # number of values that this thread has logged since then


class StepFlag(IntFlag):
    """Further facts about a step."""

    EXPLICIT = 1  # bounded by trace_step()
    INFERRED = 2  # no optimizer was seen; bounded by batches
    SKIPPED = 4  # an optimizer attempt that changed nothing (GradScaler found inf)
    NO_LOADER = 8  # no data loader took part
    DEVICE = 16  # device times follow in device_steps
    CALLBACK = 32  # backward_own_ns was measured on this step
    EPOCH = 64  # it waited for the first batch of a new iterator; a row of epochs follows
    PROFILED = 128  # torch.profiler was started, ran or was stopped in it
    CLOSURES = 256  # its optimizer called its closure several times


class StepBits(NamedTuple):
    """The fields of the column `bits`, as numbers or as numpy arrays."""

    micro_batches: Any
    flags: Any
    sequence: Any


MICRO_BATCHES_MASK = 0xFFFF
"""A number of micro-batches under this mask is a value of `bits` without flags and sequence."""
MAX_LOGGED_NUMBERS = 64
"""Ranks may exchange a tensor of so many elements to log them; one with more may be gradients."""


def pack_bits(micro_batches: int, flags: int, sequence: int = 0) -> int:
    """Return the column `bits`: micro-batches, `StepFlag`s and the collective sequence number in one int64."""
    return (micro_batches & MICRO_BATCHES_MASK) | (flags & 0xFFFF) << 16 | (sequence & 0x7FFFFFFF) << 32


def unpack_bits(bits: Any) -> StepBits:
    """Return the fields of `bits`, of one row or of a numpy array of rows."""
    return StepBits(bits & MICRO_BATCHES_MASK, bits >> 16 & 0xFFFF, bits >> 32 & 0x7FFFFFFF)


def other_ns(rows: Any) -> Any:
    """Return the time outside the phases of steps, whose rows may lack phases that were not known then."""
    return rows["total_ns"] - sum(rows[name] for name in PHASE_COLUMNS if name in rows.dtype.names)


class MetricKind(IntEnum):
    """Source of a logged value."""

    USER = 0
    TENSORBOARD = 1  # torch.utils.tensorboard, tensorboardX
    LIGHTNING = 2
    HUGGINGFACE = 3
    COLLECTOR = 4
    PLUGIN = 5  # a third party's framework plugin
    RAY = 6  # ray.train.report


class Resource(IntEnum):
    """A resource with a limit, of the rank's process or of its host."""

    OPEN_FILES = 0  # descriptors of the process, of RLIMIT_NOFILE
    SHARED_MEMORY = 1  # bytes of /dev/shm
    DISK = 2  # bytes of the working directory's file system
    PROCESSES = 3  # processes and threads of the cgroup
    MEMORY = 4  # bytes of the cgroup's memory, without file cache
    CPU_QUOTA = 5  # scheduling periods in which the cgroup was throttled, of all since the start
    CHECKPOINT_DISK = 6  # bytes of the checkpoints' file system, where it is not that of the working directory
    CPU_TIME = 7  # seconds of CPU time of the process, of RLIMIT_CPU


class Pause(IntEnum):
    """Cause of a row of `PAUSES`: it paused the training."""

    COLLECTION = 0  # the interpreter's garbage collector
    COMPILATION = 1  # torch.compile
    SAVE = 2  # a checkpoint


class Compiled(IntEnum):
    """Column `detail` of a compilation in `PAUSES`."""

    FIRST = 0  # the first of its function
    AGAIN = 1  # no version of the function fitted its inputs
    LIMIT = 2  # none fitted, and there are as many versions as torch allows: the call ran uncompiled
    BACKWARD = 3  # backward pass of one that was recompiled


def _q(name: str, doc: str) -> Column:
    return Column(name, "q", doc)


def _d(name: str, doc: str) -> Column:
    return Column(name, "d", doc)


# Exclusive wall time per phase on the training thread; `other` is the rest of total_ns, so the parts add up. Rows are
# filled by position, in three files of `instrument`: open_step/step_rows.py, clock_implementations.py and
# native/hot_fields.c.
STEPS = Table(
    "steps",
    (
        _q("step", "training step, from 0"),
        _q("t_end_ns", "monotonic timestamp at which the step closed"),
        _q("total_ns", "wall time of the step, without evaluation between steps"),
        *(_q(phase.column, phase.doc) for phase in Phase),
        _q("backward_own_ns", "backward time until the last local gradient; -1 when not measured"),
        _q("elements", "numbers in the model's input: elements of the first tensor, of all micro-batches"),
        _q("samples", "samples in the model's input: first dimension of that tensor, of all micro-batches"),
        _q("bits", "micro-batches (16 bits), StepFlag (16 bits), collective sequence number (31 bits)"),
    ),
    capacity=65536,
)

USER_PHASES = Table(
    "user_phases",
    (
        _q("step", "training step"),
        _q("name_id", "the phase's name, by id in `names`"),
        _q("ns", "exclusive wall time in this step"),
        _q("count", "number of times it was entered in this step"),
    ),
    capacity=16384,
)
EVALS = Table(
    "evals",
    (
        _q("step", "next training step"),
        _q("t_end_ns", "monotonic timestamp at its end"),
        _q("ns", "wall time of evaluation batches, outside every step"),
        _q("batches", "evaluation batches"),
        _q("input_wait_ns", "waiting for their data"),
        _q("forward_ns", "calls of the model"),
    ),
    capacity=4096,
)
EPOCHS = Table(
    "epochs",
    (
        _q("step", "training step"),
        _q("t_end_ns", "monotonic timestamp at which the step closed"),
        _q("ns", "waiting for data in this step, with the next two"),
        _q("create_ns", "creating the data loader's iterator, which starts its workers"),
        _q("drain_ns", "end of the iterator before, which ends its workers"),
        _q("first", "1 in the first step of the process, else 0"),
    ),
    capacity=4096,
)
DEVICE_STEPS = Table(
    "device_steps",
    (
        _q("step", "training step"),
        _q("total_ns", "device time from the start of this step to the start of the next"),
        _q("h2d_ns", "device time of copies"),
        _q("forward_ns", "device time of forward"),
        _q("backward_ns", "device time of backward, including exposed communication"),
        _q("backward_own_ns", "device time until the last local gradient; -1 when not measured"),
        _q("optimizer_ns", "device time of the optimizer"),
        _q("comm_ns", "device time of collectives called from Python"),
    ),
    capacity=16384,
)
DEVICE_PHASES = tuple(phase for phase in Phase if phase.column in DEVICE_STEPS.index)
PROCESS = Table(
    "process",
    (
        _q("t_ns", "monotonic timestamp"),
        _q("step", "open training step"),
        _q("rss_bytes", "resident memory"),
        _q("cpu_ns", "CPU time of all threads since start"),
        _q("threads", "threads"),
        _q("voluntary_switches", "voluntary context switches since start"),
        _q("involuntary_switches", "involuntary context switches since start"),
        _q("minor_faults", "minor page faults since start"),
        _q("major_faults", "major page faults since start"),
        _q("main_run_ns", "training thread, before it is known the main one: time on a CPU core since start"),
        _q("main_wait_ns", "the same: time spent waiting for a CPU core since start"),
    ),
    capacity=4096,
)
HOST = Table(
    "host",
    (
        _q("t_ns", "monotonic timestamp"),
        _q("cores", "CPU cores this job may use"),
        _d("cpu_pct", "CPU utilization over all cores since the last sample, 0..100"),
        _q("memory_used_bytes", "memory in use"),
        _q("memory_total_bytes", "total memory"),
        _q("disk_read_bytes", "bytes read from disks since boot"),
        _q("disk_write_bytes", "bytes written to disks since boot"),
        _q("net_recv_bytes", "bytes received since boot, all interfaces except loopback"),
        _q("net_sent_bytes", "bytes sent since boot, all interfaces except loopback"),
    ),
    capacity=4096,
)
GPU = Table(
    "gpu",
    (
        _q("t_ns", "monotonic timestamp"),
        _q("index", "NVML device index"),
        _d("utilization_pct", "share of time with a kernel running, 0..100"),
        _q("memory_used_bytes", "device memory in use"),
        _q("memory_total_bytes", "total device memory"),
        _d("temperature_c", "degrees Celsius"),
        _d("power_w", "watts"),
        _q("sm_clock_mhz", "SM clock"),
        _q("throttle_reasons", "NVML bit mask of clock throttle reasons"),
        _d("others_pct", "share of time with a kernel of another program running, 0..100; -1 when not known"),
    ),
    capacity=4096,
)
TORCH_MEMORY = Table(
    "torch_memory",
    (
        _q("t_ns", "monotonic timestamp"),
        _q("step", "open training step"),
        _q("device", "device index"),
        _q("allocated_bytes", "bytes allocated by torch"),
        _q("reserved_bytes", "bytes reserved by torch's allocator"),
        _q("peak_allocated_bytes", "peak allocated bytes so far"),
        _q("total_bytes", "memory of the device"),
        _q("alloc_retries", "allocations so far that succeeded only after the cache was freed"),
        _q("pinned_bytes", "pinned host memory in use by this process, on each device's row; -1 when not known"),
    ),
    capacity=4096,
)
LIMITS = Table(
    "limits",
    (
        _q("t_ns", "monotonic timestamp"),
        _q("step", "open training step"),
        _q("resource", "the resource: Resource"),
        _q("used", "units in use"),
        _q("limit", "units that there are"),
    ),
    capacity=1024,
)
LOADER_WORKERS = Table(
    "loader_workers",
    (
        _q("t_ns", "monotonic timestamp"),
        _q("step", "open training step"),
        _q("loader", "number of the data loader in this process, from 0"),
        _q("pid", "its first worker process; another one means that the workers were started again"),
        _q("workers", "worker processes that are alive"),
        _q("cpu_ns", "CPU time of these since their start, all together"),
        _q("wait_ns", "time in which their main threads waited for a CPU core since their start, all together"),
        _q("cores", "CPU cores that at least one of them may use"),
        _q(
            "private_bytes",
            "memory that each has for itself, all together; -1 where none was newly read or has grown fast",
        ),
        _q("anonymous_bytes", "the same with memory that is still shared with the training process since the fork"),
    ),
    capacity=1024,
)
TELEMETRY = Table(
    "telemetry",
    (
        _q("t_ns", "monotonic timestamp"),
        _q("rows_appended", "rows of all tables appended so far"),
        _q("rows_lost", "rows overwritten before they were sent"),
        _q("bytes_sent", "bytes sent to the aggregator"),
        _q("sender_cpu_ns", "CPU time of the recorder's thread"),
        _q("hook_ns_per_step", "measured cost of hooks and row per step on this rank"),
        _q("sampler_ns", "time spent in samplers"),
        _q("sampler_errors", "samples that failed"),
        _q("reconnects", "number of reconnects"),
    ),
    capacity=1024,
)
LOSSES = Table(
    "losses",
    (
        _q("t_ns", "monotonic timestamp at which the loss was read"),
        _q("step", "training step"),
        _d("loss", "sum of the tensors on which backward was called in this step; may be NaN or infinite"),
    ),
    capacity=4096,
)
FINGERPRINTS = Table(
    "fingerprints",
    (_q("step", "training step"), _q("fingerprint", "hash of 16 numbers of the batch; equal batches have equal ones")),
    capacity=1024,
)
PAUSES = Table(
    "pauses",
    (
        _q("t_end_ns", "monotonic timestamp of its end"),
        _q("step", "open training step; -1 without one, and during an evaluation"),
        _q("cause", "what it was: Pause"),
        _q("phase", "Phase that was open; -1: other code; of several together -1"),
        _q("ns", "wall time of it, or of several short ones together"),
        _q("count", "how many they are"),
        _q(
            "detail",
            "collection: generation; compilation: 0 the first of a function, 1 again for other inputs, 2 none, as the "
            "limit is reached, 3 the backward pass of one that was recompiled; save: 1 if files are written after it",
        ),
        _q("called", "1 if the script's code called for it, else 0"),
        _q("size_bytes", "save: bytes of the files; -1 where that is not known"),
        _q("line_id", "the function, or the line that called for it, `FILE:LINE FUNCTION`, by id in `names`; else -1"),
        _q(
            "text_id",
            "collection: the library's line that called for it; compilation: the guard that failed; save: its first "
            "file; by id in `names`, else -1",
        ),
    ),
    capacity=2048,
)
# Values of `phase` in `LINES` other than those of Phase.
LINE_OTHER, LINE_OUTSIDE, LINE_STARTUP, LINE_THREADS, LINE_WORKERS = -1, -2, -3, -4, -5
LINE_PHASES = {
    **{int(phase): phase.label for phase in Phase},
    LINE_OTHER: "other",
    LINE_OUTSIDE: "outside",
    LINE_STARTUP: "startup",
    LINE_THREADS: "threads",
    LINE_WORKERS: "workers",
}
"""Names of the values of `phase` in `LINES`; see `line_phase_name`."""


def line_phase_name(phase: int) -> str:
    """Return the name of a value of `phase` in `LINES`; workers of all loaders have one."""
    return LINE_PHASES.get(max(phase, LINE_WORKERS), "other")


LINE_AFTER_STEPS = "after"
"""Name for rows after the last step of a run that has ended, which readers recognize by their time."""
IMPORTING = "<frozen importlib._bootstrap>"
"""File of the library function of samples that were taken while a module was imported."""
LINES = Table(
    "lines",
    (
        _q("t_ns", "monotonic timestamp of the last sample"),
        _q("step", "open training step, -1 without one"),
        _q(
            "phase",
            "Phase that was open; -1: other code in a step, -2: between steps, -3: before the first step; -4: not the "
            "training thread, but the busiest of the other Python threads, while there is a step; -5 - n: a worker of "
            "the rank's loader n that makes a batch, or, without line and library, waits",
        ),
        _q("line_id", "the user's line, `FILE:LINE FUNCTION`, by id in `names`; -1 without one"),
        _q("library_id", "innermost library function called from there, `FILE:LINE FUNCTION`; -1 without one"),
        _q("samples", "number of samples since the last row of this phase and line"),
        _q(
            "watched_ns",
            "time before these samples in which the phase, the threads, or a worker that made batches, were watched "
            "without a break",
        ),
        _q(
            "cpu_ns",
            "CPU time of the training thread (while it makes a batch, also of threads that are not Python's), or of "
            "all other Python threads, in that time; of a worker also its wait for a core",
        ),
    ),
    capacity=1024,
)
METRICS = Table(
    "metrics",
    (
        _q("t_ns", "epoch nanoseconds of the call"),
        _q("step", "training step, or the user's own counter"),
        _q("name_id", "the metric's name, by id in `names`"),
        _d("value", "the value; may be NaN or infinite"),
        _q("kind", "source: MetricKind"),
        _q("experiment", "number of the experiment in `logged`; 0 is the run itself"),
    ),
    capacity=16384,
)
# {"id": int, "name": str}: a name is sent once, before the rows that use it.
NAMES = Log("names", 256 * 1024)
# Logged data other than numbers: {"kind": str, "t_ns": epoch ns, "experiment": int, ...}; kinds: experiment, params,
# tags, text, image, histogram, artifact, value (a metric's value that is not a number), refused, end.
LOGGED = Log("logged", 256 * 1024)
# Chunks of files, where the rank cannot reach the run's folder: {"id", "offset", "size", "data", ...}. The aggregator
# writes the bytes into the folder, and only their location into the store.
BLOBS = Log("blobs", 0)
# {"kind": str, "t_ns": int, ...}; see `InfoKind`.
INFO = Log("info", 256 * 1024)

PACKED: tuple[Table, ...] = (
    STEPS, USER_PHASES, EVALS, EPOCHS, DEVICE_STEPS, PROCESS, HOST, GPU, TORCH_MEMORY, LOADER_WORKERS, TELEMETRY,
    METRICS, LINES, LIMITS, LOSSES, FINGERPRINTS, PAUSES,
)  # fmt: skip
# Tables of samplers, and of the recorder's own counters: summed over the whole run, and sent less often in large jobs.
SAMPLED_TABLES: tuple[Table, ...] = (PROCESS, HOST, GPU, TORCH_MEMORY, LOADER_WORKERS, TELEMETRY, LIMITS)
LOGS: tuple[Log, ...] = (NAMES, INFO, LOGGED)
# Rows that the user logged are never evicted: beyond the memory limit they go to a journal on disk.
USER_TABLES = frozenset({METRICS.name, LOGGED.name})
JOURNALED = USER_TABLES | {NAMES.name}
# Tables of which the aggregator of a host sends on the rows of all its ranks; of others it chooses ranks.
RELAYED_WHOLE = frozenset({NAMES.name, INFO.name, METRICS.name})
TABLES: dict[str, Table | Log] = {
    **{table.name: table for table in PACKED},
    **{log.name: log for log in (*LOGS, BLOBS)},
}


def native_layout() -> str:
    """Return `NAME=number ...` of phases, open slots and the columns that the hooks in C write, as these spell them."""
    names = [(f"PHASE_{phase.name}", phase.value) for phase in Phase]
    names += [("PHASE_OTHER", len(Phase)), *((f"SLOT_{slot.name}", slot.value) for slot in Slot)]
    for table in (STEPS, METRICS):
        columns = [*table.names, "columns"]
        names += [(f"{table.name}_{column}".upper(), number) for number, column in enumerate(columns)]

    return " ".join(f"{name}={number:d}" for name, number in names)
