"""Users' logging calls: `log_*` for the active experiment, or for the run's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from traceml.instrument.dynamo import skip_leaf_code, uncompiled
from traceml.track.rank import media
from traceml.track.rank.active_experiment import loggers
from traceml.track.rank.experiment import Experiment, open_experiments
from traceml.track.rank.logged_values import items_of, params_of

__all__ = [
    "get_active_experiment",
    "log_artifact",
    "log_histogram",
    "log_image",
    "log_metric",
    "log_metrics",
    "log_params",
    "log_text",
]


def get_active_experiment() -> Experiment | None:
    """Return the innermost experiment that has begun and not ended; None if there is none.

    Examples:
        >>> with traceml.Experiment("warm-up", backend="jsonl"):
        ...     print(traceml.get_active_experiment().name)
        warm-up
    """
    return open_experiments[-1] if open_experiments else None


@uncompiled
def log_metric(name: str, value: Any, step: int | None = None) -> None:
    """Log one value.

    Examples:
        >>> traceml.log_metric("val/accuracy", 0.93)

    Args:
        name: any text.
        value: a number, or an object that holds one: a tensor, a numpy scalar, a bool. Any other is logged as a text.
        step: the step; by default the current training step, else a counter per name.

    Raises:
        ArgumentTypeError: the name is not a text, or the step not a whole number.
    """
    logger = loggers.active
    append_usual = logger.append_usual
    if append_usual is None or not append_usual(name, value, step):
        logger.metric(name, value, step)


@uncompiled
def log_metrics(metrics: Mapping[str, Any], step: int | None = None) -> None:
    """Log several values at one step.

    Examples:
        >>> traceml.log_metrics({"loss": 0.5, "lr": 0.1}, step=1)

    Args:
        metrics: name -> value; see `log_metric`.
        step: their step.
    """
    logger = loggers.active
    append_usual = logger.append_usual
    for name, value in items_of(metrics):
        if append_usual is None or not append_usual(name, value, step):
            logger.metric(name, value, step)


@uncompiled
def log_params(params: Mapping[str, Any]) -> None:
    """Log parameters of this run.

    Examples:
        >>> traceml.log_params({"lr": 0.1, "model": {"layers": 12}})

    Args:
        params: name -> value; maps may be nested.
    """
    logger = loggers.active
    if logger.begin():
        logger.row("params", params=params_of(params))


@uncompiled
def log_artifact(path: str | os.PathLike[str], name: str | None = None) -> None:
    """Log a file, or the files of a folder. It may be deleted right after, but not be rewritten in place.

    A runs folder within the folder is left out: it changes while it is read.

    Examples:
        >>> traceml.log_artifact("trace.pfw.gz", "traces/rank0.pfw.gz")

    Args:
        path: the file or folder. It is opened now and copied by a background thread.
        name: its name; by default that of the file or folder.

    Raises:
        ArgumentTypeError: it is no path.
        FileUnreadableError: it cannot be opened; `FileMissingError` where there is none. Both are an `OSError`, too.
    """
    media.artifact(loggers.active, path, name)


@uncompiled
def log_text(name: str, text: str, step: int | None = None) -> None:
    """Log text.

    Examples:
        >>> traceml.log_text("sample", "the quick brown fox", step=1)

    Args:
        name: any text.
        text: the text.
        step: its step; by default as for `log_metric`.

    Raises:
        ArgumentTypeError: the name is not a text, or the step not a whole number.
    """
    media.text(loggers.active, name, text, step)


@uncompiled
def log_image(name: str, image: Any, step: int | None = None) -> None:
    """Log an image.

    Examples:
        >>> import numpy
        >>> traceml.log_image("noise", numpy.random.rand(32, 32), step=1)

    Args:
        name: any text.
        image: an array or tensor (height, width), (height, width, channels) or (channels, height, width), of bytes or
            of floats in 0..1; a PIL image; a matplotlib figure; a PNG or JPEG file's path or bytes.
        step: its step; by default as for `log_metric`.

    Raises:
        ArgumentTypeError: the name is not a text, or the step not a whole number.
        FileUnreadableError: the file cannot be opened.
    """
    media.image(loggers.active, name, image, step)


@uncompiled
def log_histogram(name: str, values: Any, step: int | None = None, *, bins: int = 64) -> None:
    """Log the distribution of values.

    Examples:
        >>> traceml.log_histogram("gradients", [0.1, 0.3, 0.2], step=1, bins=8)

    Args:
        name: any text.
        values: numbers: an array, a tensor, a list.
        step: its step; by default as for `log_metric`.
        bins: number of intervals of equal width, at most 65,536.

    Raises:
        ArgumentTypeError: the name is not a text, or the step not a whole number.
        UsageError: there are no bins, or too many.
    """
    media.histogram(loggers.active, name, values, step, bins=bins)


skip_leaf_code(__name__.rpartition(".")[0])  # before the first call, which a compiled function may make
