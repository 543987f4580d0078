"""Ray Train: `TorchTrainer(trace(train_loop), ...)`: all workers are the ranks of one run, in the driver's folder.

Ray starts workers in folders of its own, on any host, and runs their training in a thread. They find each other by
settings from the driver, and through the process group that Ray has created. When one fails, Ray kills the others at
once, so the driver shows the verdict.
"""

from __future__ import annotations

import functools
import logging
import secrets
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from traceml.integrations.training_session import TrainingSession
from traceml.recorder.identity import script_name
from traceml.recorder.run_notices import show_verdict
from traceml.settings import load

__all__ = ["trace"]

_log = logging.getLogger("traceml")

_START_S = 20.0  # longest start of the first rank's aggregator

F = TypeVar("F", bound=Callable[..., Any])


def trace(train_loop: F, *, report: bool = True, **settings: Any) -> F:
    """Return a train loop that is traced in each worker, as one run.

    Call it on the driver. On one host the workers use the aggregator that runs, or start one; with several hosts, rank
    0 starts one for all.

    Examples:
        >>> trainer = TorchTrainer(trace(train_loop), scaling_config=ScalingConfig(num_workers=4))
        >>> trainer.fit()

    Args:
        train_loop: as for `TorchTrainer`.
        report: show the verdict: on rank 0, or on the driver when `fit()` raises.
        settings: as for `traceml.init`; those of the driver's environment and files apply in the workers too.

    Raises:
        SettingsError: an unknown setting or a bad value.
    """
    config = load(**settings)
    given = {name: getattr(config, name) for name, source in config.sources.items() if source != "default"}
    given |= {"runs_dir": config.runs_dir.absolute(), "run_name": config.run_name or script_name()}
    token = config.token or secrets.token_hex(16)
    if report and config.enabled:
        _show_failures(given["runs_dir"], given["run_name"])

    @functools.wraps(train_loop)
    def traced(*args: Any) -> Any:
        session = TrainingSession(given | _address(token), report=report, ends_process=True)
        session.begin()
        try:
            result = train_loop(*args)
        except BaseException as error:
            session.end(error, show=False)
            raise

        session.end()
        return result

    return traced  # type: ignore[return-value]


def _address(token: str) -> dict[str, Any]:
    """Return the settings with which the ranks of several hosts reach one aggregator; empty on one host."""
    from ray.train import get_context

    context = get_context()
    if context.get_local_world_size() == context.get_world_size():
        return {}

    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        _log.warning(
            "without a process group the ranks of several hosts cannot share an aggregator: each host has its own run"
        )
        return {}

    is_first = context.get_world_rank() == 0
    shared = [_free_address() if is_first else None]
    distributed.broadcast_object_list(shared, src=0)
    assert shared[0] is not None
    host, port = shared[0]
    return {"host": host, "port": port, "token": token, "local": is_first, "connect_timeout": _START_S}


def _free_address() -> tuple[str, int]:
    """Return this node's address and a free port."""
    from ray.util import get_node_ip_address

    host = str(get_node_ip_address())
    with socket.create_server((host, 0)) as listener:
        return host, int(listener.getsockname()[1])


# --- the driver ------------------------------------------------------------------------------------------------------

_shown: set[tuple[Path, str]] = set()  # runs_dir and name of the runs whose failures the driver shows


def _show_failures(runs_dir: Path, name: str) -> None:
    """Have `fit()` show the verdicts of runs that began in it when it raises."""
    try:
        from ray.train.torch import TorchTrainer
    except ImportError:  # a driver without torch
        return

    if not _shown:
        owner = next(base for base in TorchTrainer.__mro__ if "fit" in vars(base))
        owner.fit = _showing_failures(owner.fit)

    _shown.add((runs_dir, name))


def _showing_failures(original: Any) -> Any:
    @functools.wraps(original)
    def fit(self: Any) -> Any:
        before = _run_folders()
        try:
            return original(self)
        except Exception:
            for run_dir in _new_runs(before)[-1:]:  # of the last attempt
                show_verdict(run_dir)

            raise

    return fit


def _new_runs(before: set[Path]) -> list[Path]:
    """Return the runs of traced loops that were not there before, the oldest first."""
    from traceml.runs.find import describe_run

    return sorted(path for path in _run_folders() - before if (path.parent, describe_run(path).name) in _shown)


def _run_folders() -> set[Path]:
    from traceml.runs.find import run_folders

    return {path for folder in {folder for folder, _ in _shown} for path in run_folders(folder)}
