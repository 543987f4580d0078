"""Catalog of the metrics for monitoring systems: names, units and labels, in one table for every exporter."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["BaseUnit", "Instrument", "Instruments"]


class BaseUnit(Enum):
    """Base unit of a metric: the ending of its Prometheus name, and its UCUM code in OpenTelemetry."""

    NONE = ("", "1")
    SECONDS = ("seconds", "s")
    BYTES = ("bytes", "By")
    RATIO = ("ratio", "1")
    CELSIUS = ("celsius", "Cel")
    WATTS = ("watts", "W")

    @property
    def suffix(self) -> str:
        """The ending of Prometheus names."""
        return self.value[0]

    @property
    def ucum(self) -> str:
        """The code of OpenTelemetry."""
        return self.value[1]


@dataclass(frozen=True, slots=True)
class Instrument:
    """A metric of a run."""

    stem: str  # its name without prefix and unit
    help: str  # its meaning, one sentence without a period
    unit: BaseUnit = BaseUnit.NONE  # its base unit
    labels: tuple[str, ...] = ("run",)  # names of its labels; the first of a run's metrics is `run`
    counter: bool = False  # whether it only grows while the run lasts

    @property
    def prometheus_name(self) -> str:
        """The name of its samples in Prometheus: `traceml_step_seconds`."""
        ending = "total" if self.counter else ""
        return "_".join(part for part in ("traceml", self.stem, self.unit.suffix, ending) if part)

    @property
    def otel_name(self) -> str:
        """The name in OpenTelemetry, from which a collector makes the Prometheus name: `traceml.step`."""
        return f"traceml.{self.stem}"


_RANK, _PHASE, _HOST = ("run", "rank"), ("run", "phase"), ("run", "host")
_GPU, _FINDING = ("run", "host", "gpu"), ("run", "kind", "severity")
_OVER_RANKS = "the smallest, the median, the 95th percentile and the largest of all ranks"


class Instruments:
    """Every metric, by a name for the code; `all()` lists them in the order of declaration."""

    RUNS = Instrument("runs", "Runs in the folder, by state", labels=("state",))
    RUNS_HIDDEN = Instrument("runs_hidden", "Running runs that are left out because there are too many", labels=())
    RUN = Instrument("run_info", "Name, project and state of a running run; the value is 1",
                     labels=("run", "name", "project", "state"))  # fmt: skip
    WORLD = Instrument("world_size", "Ranks of the run")
    RANKS = Instrument("ranks", "Ranks of the last attempt, by state", labels=("run", "state"))
    RESTARTS = Instrument("restarts", "Restarts of the job", counter=True)
    STEPS = Instrument("steps", "Steps of the rank with the most steps", counter=True)
    RANK_STEPS = Instrument("rank_steps", "Steps of a rank", labels=_RANK, counter=True)
    STEP = Instrument("step", "Mean duration of the newest steps", BaseUnit.SECONDS)
    STEP_PERCENTILE = Instrument("step_percentile", "Percentiles of the duration of the newest steps", BaseUnit.SECONDS,
                                 ("run", "percentile"))  # fmt: skip
    STEP_RATE = Instrument("steps_per_second", "Steps per second of wall time")
    SAMPLE_RATE = Instrument("samples_per_second", "Samples per second of the whole job")
    TOKEN_RATE = Instrument("tokens_per_second", "Tokens per second of the whole job; padding counts")
    PHASE = Instrument("phase", "Mean time of a phase in a step of a rank", BaseUnit.SECONDS, ("run", "rank", "phase"))
    PHASE_MEAN = Instrument("phase_mean", "Mean time of a phase in a step over all ranks", BaseUnit.SECONDS, _PHASE)
    PHASE_SPREAD = Instrument("phase_over_ranks", f"Mean time of a phase in a step: {_OVER_RANKS}", BaseUnit.SECONDS,
                              ("run", "phase", "statistic"))  # fmt: skip
    PHASE_SHARE = Instrument("phase_share", "Share of step time in a phase", BaseUnit.RATIO, _PHASE)
    LOGGED = Instrument("logged_value", "Last value of a logged metric, the loss for example", labels=("run", "name"))
    RSS = Instrument("rank_memory_peak", "Largest resident memory of a rank", BaseUnit.BYTES, _RANK)
    RSS_SPREAD = Instrument("memory_peak_over_ranks", f"Largest resident memory: {_OVER_RANKS}", BaseUnit.BYTES,
                            ("run", "statistic"))  # fmt: skip
    CUDA = Instrument(
        "rank_gpu_memory_peak", "Largest GPU memory that torch allocated in a rank", BaseUnit.BYTES, _RANK
    )
    CUDA_SPREAD = Instrument("gpu_memory_peak_over_ranks", f"Largest GPU memory that torch allocated: {_OVER_RANKS}",
                             BaseUnit.BYTES, ("run", "statistic"))  # fmt: skip
    HOST_CPU = Instrument("host_cpu", "Mean CPU utilization of a host", BaseUnit.RATIO, _HOST)
    HOST_MEMORY = Instrument("host_memory_peak", "Largest share of a host's memory in use", BaseUnit.RATIO, _HOST)
    GPU_USE = Instrument("gpu_utilization", "Mean utilization of a GPU", BaseUnit.RATIO, _GPU)
    GPU_MEMORY = Instrument("gpu_memory_used_peak", "Largest memory in use on a GPU", BaseUnit.BYTES, _GPU)
    GPU_SIZE = Instrument("gpu_memory_size", "Memory of a GPU", BaseUnit.BYTES, _GPU)
    GPU_HEAT = Instrument("gpu_temperature_peak", "Highest temperature of a GPU", BaseUnit.CELSIUS, _GPU)
    GPU_POWER = Instrument("gpu_power", "Mean power of a GPU", BaseUnit.WATTS, _GPU)
    TIME = Instrument(
        "time",
        "Wall time of the run by part; where others wait, of the ranks that evaluate or save",
        BaseUnit.SECONDS,
        ("run", "part"),
    )
    GOODPUT = Instrument("goodput", "Share of wall time in steps that count, without waiting for data", BaseUnit.RATIO)
    VERDICT = Instrument("verdict", "The verdict of the run as labels; the value is 1", labels=_FINDING)
    COST = Instrument(
        "finding_cost",
        "Share of step time that a finding costs; of wall time for kinds about the run",
        BaseUnit.RATIO,
        _FINDING,
    )
    ROWS = Instrument("rows_stored", "Rows of tracing that were stored", counter=True)
    LOST = Instrument("rows_lost", "Rows of tracing that were lost", counter=True)
    OVERHEAD = Instrument("overhead", "Time of tracing in a step of a rank", BaseUnit.SECONDS)
    OVERHEAD_SHARE = Instrument("overhead_share", "Share of step time that tracing takes", BaseUnit.RATIO)
    FAILURES = Instrument("failures", "Failures of tracing itself, by package", labels=("run", "package"), counter=True)
    PENDING = Instrument("tracker_pending_rows", "Rows that a tracker is still missing", labels=("run", "backend"))
    REFUSED = Instrument("tracker_failed_rows", "Rows that a tracker refused", labels=("run", "backend"))

    @classmethod
    def all(cls) -> list[Instrument]:
        """Return every metric."""
        return [value for value in vars(cls).values() if isinstance(value, Instrument)]
