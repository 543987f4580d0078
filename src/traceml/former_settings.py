"""Settings of traceml-ai, another product of the same import name, and their spelling here."""

from __future__ import annotations

__all__ = ["former_setting", "is_automatic_mode"]

# Its argument of `init`, or its variable without TRACEML_ -> setting here.
_RENAMED = {
    "aggregator_host": "host",
    "aggregator_bind_host": "host",
    "aggregator_port": "port",
    "connect_timeout_sec": "connect_timeout",
    "interval": "sample_interval",
    "logs_dir": "runs_dir",
    "on_missing_aggregator": "on_missing",
    "session_id": "run_id",
}
_ELSEWHERE = {
    "dashboard_port": "`traceml serve --web PORT`",
    "disabled": "`enabled=False`, or TRACEML_ENABLED=0",
    "enable_logging": "`log_level`, or TRACEML_LOG_LEVEL=debug",
    "expected_world_size": "nothing to set: the ranks report the size of the job",
    "html_report": "nothing to set: each run has a report.html",
    "master_addr": "an option of `traceml run`, as of torchrun: --master-addr",
    "master_port": "an option of `traceml run`, as of torchrun: --master-port",
    "mode": "nothing to set for mode='auto'; steps are marked by hand with `traceml.trace_step()`",
    "nnodes": "an option of `traceml run`, as of torchrun: --nnodes",
    "node_rank": "an option of `traceml run`, as of torchrun: --node-rank",
    "nproc_per_node": "an option of `traceml run`, as of torchrun: --nproc-per-node",
    "profile": "`traceml profile`, on a running job",
    "ui_mode": "`traceml run --live terminal|web|none`",
    **dict.fromkeys(
        ("patch_backward", "patch_dataloader", "patch_forward", "patch_h2d"),
        "nothing to set: all phases are measured",
    ),
}


def former_setting(key: str, *, is_variable: bool) -> str | None:
    """Return the spelling here of a setting of traceml-ai; None for any other name.

    Args:
        key: its argument of `init`, or its variable in lower case and without the prefix.
        is_variable: name the variable, not the argument.
    """
    renamed = _RENAMED.get(key)
    if renamed is not None:
        return f"TRACEML_{renamed.upper()}" if is_variable else f"`{renamed}`"

    return _ELSEWHERE.get(key)


def is_automatic_mode(key: str, value: object) -> bool:
    """Whether it is traceml-ai's `mode="auto"`, which is all that there is here."""
    return key == "mode" and value == "auto"
