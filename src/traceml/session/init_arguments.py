"""Arguments of `traceml.init()` by name and type, for completion and type checkers; imported by these alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal, TypedDict

__all__ = ["InitArguments"]


class InitArguments(TypedDict, total=False):
    """The settings, as `traceml.settings` declares them; a list may be given as text with commas."""

    enabled: bool
    host: str
    port: int
    token: str | None
    tls: bool
    local: bool
    on_missing: Literal["raise", "warn"]
    connect_timeout: float
    runs_dir: str | PathLike[str]
    log_dir: str | PathLike[str]
    fleet_dir: str | PathLike[str] | None
    upstream: str | None
    run_id: str | None
    run_name: str | None
    project: str
    backend: Sequence[str]
    backend_options: Mapping[str, dict[str, Any]]
    collectors: Sequence[str]
    frameworks: Sequence[str]
    track_system: bool
    track_git: bool
    track_env: bool
    collect_after: float
    sample_interval: float
    sampler_intervals: Mapping[str, float]
    stack_interval: float
    hang_timeout: float
    on_hang: Literal["report", "abort"]
    on_finding: Sequence[str]
    on_finding_after: float
    profile_on_finding: float
    metrics_interval: float
    flush_interval: float
    ring_rows: int
    max_queue_size: int
    max_retries: int
    backoff_factor: float
    max_backoff: float
    max_image_bytes: int
    max_artifact_bytes: int
    include: Sequence[str]
    exclude: Sequence[str]
    mask: Sequence[str]
    otlp_endpoint: str | None
    topology_file: str | PathLike[str] | None
    local_only: bool
    keep_runs: int | None
    retention: float | Literal["off"]
    delivery_nice: int
    debug: bool
    quiet: bool
    log_level: int | Literal["debug", "info", "warning", "error", "critical"]
