"""The report as an object: `traceml.report/1`, written as JSON and read back validated."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, Literal

import msgspec

from traceml.diagnosis.facts.ends import RankExit
from traceml.diagnosis.findings import Finding, significant
from traceml.diagnosis.kinds import Kind
from traceml.errors import StoreError
from traceml.ids import DEFAULT_PROJECT
from traceml.runs.json_document import UNREADABLE_JSON, JsonDocument
from traceml.trusted_files import read_regular

__all__ = [
    "SCHEMA", "ExitSection", "GpuSection", "HostSection", "LineSection", "MemorySection", "MetricSection",
    "PhaseSection", "RankMean", "RankMemory", "RankSection", "Report", "ReportSummary", "RestartSection",
    "RunOrigin", "RunSection", "SetupSection", "SourceSection", "StepTimes", "StepsSection", "SystemSection",
    "TelemetrySection", "TimePart", "TimeSection", "TrackerSection", "rate_of", "read_report",
]  # fmt: skip

SCHEMA: Literal["traceml.report/1"] = "traceml.report/1"
# A rank is marked as the slowest when its own work is this much above the others' median; below, ranks differ by noise.
_STANDS_OUT = 1.10


class RestartSection(msgspec.Struct, kw_only=True):
    """A restart of the job: the attempt that ended, the ranks that ended it, why, and in which step.

    `ranks` is empty if the scheduler or the launcher ended it. `lost_s` is the time from the last step before to the
    first step after; None while there is none.
    """

    attempt: int
    ranks: list[int] = []
    reason: str = ""
    step: int | None = None
    lost_s: float | None = None


class RunSection(msgspec.Struct, kw_only=True):
    """Identity and outcome of the run; times are epoch seconds, `duration_s` counts up while it runs.

    `steps_waiting` counts the steps that ranks left in flight files of this host when their aggregator was gone.
    `commit` and `branch` are those of the script's git repository; `dirty` is whether it had uncommitted changes, None
    where git was not asked. `tags` are those that the script logged, as `name=value` or `name`. Its experiment gives
    the `project` where no setting does.
    """

    id: str
    name: str
    project: str = DEFAULT_PROJECT
    attempt: int = 0
    started: float | None = None
    ended: float | None = None
    duration_s: float | None = None
    state: str = "running"
    world_size: int = 1
    hosts: list[str] = []
    command: str | list[str] = ""
    restarts: list[RestartSection] = []
    steps_waiting: int = 0
    commit: str | None = None
    branch: str | None = None
    dirty: bool | None = None
    tags: list[str] = []

    @property
    def command_line(self) -> str:
        """The command as one text."""
        return self.command if isinstance(self.command, str) else " ".join(self.command)


class StepsSection(msgspec.Struct, kw_only=True):
    """Number and duration of steps, and the data in them.

    Rates per second are of the wall time from the first to the last step, evaluation and saving included.
    Samples and tokens are those of the whole job in a mean step; padding counts. Of ranks with identical batches, as in
    tensor-parallel groups, one counts: `data_ranks` is the number that do. They are None if the model's input is not
    known, or has parts of samples (nodes of graphs); tokens also where it is not integers by sample and position.
    The verdict of a long run (`cut`) rests on a sample of `diagnosed` steps spread over it; all else is of all steps.
    Means and percentiles leave out the first ten, which include set-up.
    `untimed_device` is the accelerator of the models if its time was not measured; phases have CPU time then.
    Where hosts are merged, `summed_ranks` is the number of ranks whose steps are all in the mean, the percentiles and
    the phases' means, as their hosts have summed them; else it is 0.
    """

    count: int = 0
    mean_ms: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    per_second: float | None = None
    samples_per_step: float | None = None
    samples_per_second: float | None = None
    tokens_per_step: float | None = None
    tokens_per_second: float | None = None
    data_ranks: int = 0
    cut: bool = False
    diagnosed: int = 0
    untimed_device: str | None = None
    summed_ranks: int = 0

    def speed(self, *, running: bool) -> float | None:
        """Return steps per second: live, the speed now; of an ended run, of the time in steps, as the mean step is."""
        return self.per_second if running or not self.mean_ms else 1e3 / self.mean_ms

    def set_rate(self, per_second: float | None) -> None:
        """Set steps, samples and tokens per second from the number of steps per second."""
        self.per_second = per_second
        self.samples_per_second = rate_of(self.samples_per_step, per_second)
        self.tokens_per_second = rate_of(self.tokens_per_step, per_second)


def rate_of(per_step: float | None, steps_per_second: float | None) -> float | None:
    """Return samples or tokens per second; None if one of the two is not known."""
    return None if per_step is None or steps_per_second is None else significant(per_step * steps_per_second)


class TimePart(msgspec.Struct):
    """A part of the run's wall time; `share` is 0..1."""

    part: str
    seconds: float
    share: float


class TimeSection(msgspec.Struct):
    """Wall time of the run by part; the parts add up to `wall_s`.

    It is the mean over ranks, or over those that evaluate or save while the others wait for them.

    `goodput` is the share in steps, without waiting for data, saving, steps that an attempt repeats, and the one in
    which it failed: the time `productive_s` in `productive_steps`. `repeated_steps` were made by an earlier attempt
    already, and lost, as they were after its last checkpoint. `hang_s` is the time without progress before attempts
    were ended; it is within `idle` and `restart`, or `startup` before the first step. `failures` counts the attempts
    that ended badly, `mtbf_s` is the productive time per failure; None without one.
    """

    wall_s: float = 0.0
    parts: list[TimePart] = []
    goodput: float = 0.0
    productive_s: float = 0.0
    productive_steps: int = 0
    repeated_s: float = 0.0
    repeated_steps: int = 0
    hang_s: float = 0.0
    failures: int = 0
    mtbf_s: float | None = None

    def count_failures(self, failures: int, hang_s: float) -> None:
        """Set the number of attempts that ended badly, and the time for which they had made no progress, in seconds."""
        self.failures, self.hang_s = failures, significant(hang_s) or 0.0
        self.mtbf_s = significant(self.productive_s / failures) if failures else None


class RankMean(msgspec.Struct):
    """Mean time of a phase on one rank."""

    rank: int
    mean_ms: float = 0.0


class PhaseSection(msgspec.Struct, kw_only=True):
    """A phase of the step over all ranks; `share` is its share of step time, 0..1."""

    phase: str
    mean_ms: float = 0.0
    share: float = 0.0
    by_rank: list[RankMean] = []


class LineSection(msgspec.Struct, kw_only=True):
    """A line of the user's code in which training threads, or their loader workers, were seen, over all ranks.

    `phase` may also be `startup` (before the first step), `outside` (between steps), `after` (after the last step of a
    run that has ended) and `workers` (loader workers that make batches). `share` is the share of the phase's samples,
    0..1. `library` is the innermost library function that it had called. Without the user's code on the stack, `file`,
    `line` and `function` are None.
    """

    phase: str
    file: str | None = None
    line: int | None = None
    function: str | None = None
    library: str | None = None
    samples: int = 0
    share: float = 0.0
    ranks: list[int] = []


class ExitSection(msgspec.Struct, kw_only=True):
    """End of a rank: exit code or signal, and its last step, open phase and stack where they are known.

    The stack is that of its exception; of a rank that hung, that of its last snapshot.
    """

    code: int | None = None
    signal: int | None = None
    exception: str | None = None
    last_step: int | None = None
    open_phase: str | None = None
    stack: str | list[str] | None = None

    @property
    def stack_text(self) -> str:
        """The stack as one text, empty if it is unknown."""
        return self.stack if isinstance(self.stack, str) else "\n".join(self.stack or ())


class RankSection(msgspec.Struct, kw_only=True):
    """State of a rank of the last attempt."""

    rank: int
    host: str = ""
    pid: int | None = None
    steps: int = 0
    state: str = "running"
    exit: ExitSection = msgspec.field(default_factory=ExitSection)

    @property
    def ended(self) -> RankExit:
        """The end of the rank, as far as the report has it."""
        end = self.exit
        return RankExit(
            rank=self.rank,
            state=self.state,
            host=self.host,
            code=end.code,
            signal=end.signal,
            exception=end.exception,
            last_step=end.last_step,
            open_phase=end.open_phase,
        )


class RankMemory(msgspec.Struct, kw_only=True):
    """Peak and growth of a rank's memory; None if it was not sampled."""

    rank: int
    rss_peak_bytes: int | None = None
    rss_slope_bytes_per_step: float | None = None
    cuda_peak_bytes: int | None = None


class MemorySection(msgspec.Struct):
    """Memory of all ranks."""

    by_rank: list[RankMemory] = []


class GpuSection(msgspec.Struct, kw_only=True):
    """A GPU: mean utilization and power, highest memory use and temperature."""

    index: int
    utilization_pct: float | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    temperature_c: float | None = None
    power_w: float | None = None


class HostSection(msgspec.Struct, kw_only=True):
    """A host: mean CPU use, highest memory use."""

    host: str
    cpu_pct: float | None = None
    memory_pct: float | None = None
    gpus: list[GpuSection] = []


class SystemSection(msgspec.Struct):
    """Hosts and their GPUs."""

    hosts: list[HostSection] = []


class MetricSection(msgspec.Struct, kw_only=True):
    """A logged metric; None if a value is not a finite number."""

    last: float | None = None
    min: float | None = None
    max: float | None = None
    count: int = 0


class TrackerSection(msgspec.Struct, kw_only=True):
    """Delivery to one tracker: rows delivered, pending and failed, and the error while there is one."""

    backend: str
    state: str = ""
    delivered: int = 0
    pending: int | None = None
    failed: int = 0
    filtered: int = 0
    fallback: int = 0
    derived: int = 0
    masked: int = 0
    latency_ms: float | None = None
    target: str = ""
    urls: list[str] = []
    error: str = ""
    reasons: dict[str, int] = {}

    @property
    def is_delivering(self) -> bool:
        """Whether a process is delivering, or soon will, and the tracker takes what it is sent."""
        return self.state in ("starting", "delivering")

    @property
    def is_broken(self) -> bool:
        """Whether its library is missing or broken, or it is misconfigured: it is not tried again."""
        return self.state == "broken"

    @property
    def needs_attention(self) -> bool:
        """Whether the tracker reports an error or refused rows."""
        return bool(self.error or self.failed)


class TelemetrySection(msgspec.Struct, kw_only=True):
    """Rows that tracing stored and lost, and its overhead."""

    rows_appended: int | None = None
    rows_stored: int | None = None
    rows_lost: int | None = None
    """None if nobody knows: a rank's host was out of reach at its end. So is `rows_appended` then."""
    rows_thinned: int | None = None
    """Stored rows that were removed because of their age; the figures of the whole run have them."""
    overhead_us_per_step: float | None = None
    overhead_share: float | None = None
    bytes_sent: int | None = None
    failures: dict[str, int] = {}
    """Failures of tracing itself that were logged and passed over, by package."""


class SetupSection(msgspec.Struct, kw_only=True):
    """Facts that decide whether two runs can be compared.

    `model` has class, parameters, dtype, device, parallelism and whether it is compiled; `params` has what was logged,
    nested names joined by a dot. `core_wait_share` is the share of their time with
    work in which ranks waited for a CPU core.
    """

    model: dict[str, Any] = {}
    batch_size: int | None = None
    params: dict[str, bool | int | float | str | None] = {}
    core_wait_share: float | None = None


class SourceSection(msgspec.Struct, kw_only=True):
    """Code and environment of the run in addition to `commit`, `branch` and `dirty`, masked.

    `diff` has the uncommitted changes of files that git tracks, at most 256 KiB of them (`diff_truncated`). `not_read`
    is why what is empty was not read; it is empty if all was, and where that is not known.
    """

    remote: str | None = None
    diff: str = ""
    diff_truncated: bool = False
    packages: dict[str, str] = {}
    variables: dict[str, str] = {}
    not_read: str = ""


class StepTimes(msgspec.Struct, kw_only=True):
    """Times of single steps, the mean over ranks, so that a report without its run can be compared.

    Of a long run, ranges of consecutive steps that are spread over it.
    """

    ms: list[float] = []
    of_steps: int = 0


class Report(JsonDocument, msgspec.Struct, kw_only=True):
    """The report of a run; `verdict` is the first finding."""

    schema: Literal["traceml.report/1"]
    traceml_version: str = ""
    run: RunSection
    verdict: Finding
    time: TimeSection | None = None
    findings: list[Finding]
    steps: StepsSection = msgspec.field(default_factory=StepsSection)
    phases: list[PhaseSection] = []
    ranks: list[RankSection] = []
    lines: list[LineSection] = []
    memory: MemorySection = msgspec.field(default_factory=MemorySection)
    system: SystemSection = msgspec.field(default_factory=SystemSection)
    metrics: dict[str, MetricSection] = {}
    hidden_metrics: int = 0
    trackers: list[TrackerSection] = []
    telemetry: TelemetrySection = msgspec.field(default_factory=TelemetrySection)
    setup: SetupSection = msgspec.field(default_factory=SetupSection)
    source: SourceSection = msgspec.field(default_factory=SourceSection)
    step_times: StepTimes = msgspec.field(default_factory=StepTimes)

    @classmethod
    def empty(cls, run_id: str) -> Report:
        """Return the report of a run whose store does not exist yet."""
        kind = Kind.INSUFFICIENT_DATA
        verdict = Finding(kind=kind, severity=kind.severity_for(0.0), summary="", next="")
        return cls(schema=SCHEMA, run=RunSection(id=run_id, name=run_id), verdict=verdict, findings=[verdict])

    def slowest_ranks(self) -> frozenset[int]:
        """Return the ranks to mark as slowest: those that the verdict accuses, else one whose own work stands out."""
        if self.verdict.blames_ranks:
            return frozenset(self.verdict.ranks)

        if self.verdict.kind is Kind.HANG:  # the mark of another rank would accuse it
            return frozenset(self.verdict.ranks if len(self.verdict.ranks) < len(self.ranks) else ())

        work_ms = self._work_ms()
        if len(work_ms) < 2:
            return frozenset()

        most = max(work_ms, key=work_ms.__getitem__)
        others_ms = statistics.median(ms for rank, ms in work_ms.items() if rank != most)
        return frozenset({most} if others_ms > 0 and work_ms[most] > _STANDS_OUT * others_ms else ())

    def _work_ms(self) -> dict[int, float]:
        """Return the own work of each rank in a step: its time without communication."""
        work_ms = dict.fromkeys(sorted(section.rank for section in self.ranks), 0.0)
        for phase in self.phases:
            for mean in phase.by_rank if phase.phase != "comm" else ():
                if mean.rank in work_ms:
                    work_ms[mean.rank] += mean.mean_ms

        return work_ms


def read_report(path: Path) -> Report:
    """Return the report in a file.

    Raises:
        StoreError: the file does not hold a report, or one of another version; the text names the file and the key.
        OSError: the file cannot be read.
    """
    data = read_regular(path)
    try:
        return msgspec.json.decode(data, type=Report)
    except UNREADABLE_JSON as error:
        if schema := _other_schema(data):
            problem = f"has the schema {schema!r}, this traceml reads {SCHEMA!r}. Use a newer traceml for this report"
            raise StoreError(f"{path} {problem}.") from error

        raise StoreError(f"{path} is not a report: {error}") from error


class _AnyReport(msgspec.Struct):
    """A report of any version."""

    schema: str = SCHEMA


def _other_schema(data: bytes) -> str:
    """Return the schema of a report that a later version has written; "" if this is none."""
    try:
        schema = msgspec.json.decode(data, type=_AnyReport).schema
    except UNREADABLE_JSON:
        return ""

    return schema if schema != SCHEMA and schema.startswith("traceml.report/") else ""


class RunOrigin(msgspec.Struct):
    """The parts of a report's `run` that lists of runs show and stores do not have at hand."""

    project: str | None = None
    tags: list[str] = []
    commit: str | None = None
    branch: str | None = None
    dirty: bool | None = None


class ReportSummary(msgspec.Struct):
    """The parts of a report that lists of runs show."""

    verdict: Finding
    run: RunOrigin = msgspec.field(default_factory=RunOrigin)
    steps: StepsSection = msgspec.field(default_factory=StepsSection)
