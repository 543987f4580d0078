"""Selection of the values that go to a backend: include, exclude, routes, sampling, aggregation.

Pure functions of the rows and of the open windows, so that a batch that is read again gives the same result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from traceml.errors import PluginError
from traceml.track.plugins.metric import Metric

if TYPE_CHECKING:
    from traceml.settings import Config

__all__ = [
    "DELIVERY_SETTINGS",
    "Aggregation",
    "DeliveryFilter",
    "backend_options",
    "check_delivery_options",
    "delivery_settings",
    "matches",
    "timeout_of",
    "variables_of",
]

# Options of `[tool.traceml.backends.<name>]` for delivery; all others are the backend's own.
_DELIVERY_OPTIONS = frozenset(
    {"routes", "include", "exclude", "sample", "aggregate", "fallback", "timeout_s", "api_key_file", "env"}
)
# Settings of an experiment that apply to delivery; its announcement has them.
DELIVERY_SETTINGS = (
    "include", "exclude", "mask", "local_only", "metrics_interval", "track_system", "max_retries", "backoff_factor",
    "max_backoff",
)  # fmt: skip
_CACHED_NAMES = 131_072
_AGGREGATES = ("mean", "min", "max", "sum", "last")


def delivery_settings(config: Config) -> dict[str, Any]:
    """Return the settings that apply to delivery, as JSON values."""
    return {name: getattr(config, name) for name in DELIVERY_SETTINGS}


def backend_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options for the backend itself."""
    return {key: value for key, value in options.items() if key not in _DELIVERY_OPTIONS}


def check_delivery_options(options: Mapping[str, Any]) -> None:
    """Check the values of the options for delivery.

    Raises:
        PluginError: an option is invalid; the text has its name, its value and what is allowed.
    """
    DeliveryFilter.of((), (), options)
    variables_of(options)
    timeout_of(options, 1.0)
    for key in ("fallback", "api_key_file"):
        value = options.get(key, "")
        if not isinstance(value, str):
            raise _invalid(key, value, "the name of a tracker" if key == "fallback" else "the path of a file")


def variables_of(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the patterns of the environment variables that a delivery gets beside its tracker's own.

    Raises:
        PluginError: they are no patterns.
    """
    return _patterns(options, "env", "MY_PROXY_*")


def timeout_of(options: Mapping[str, Any], default_s: float) -> float:
    """Return the seconds after which a call counts as hanging.

    Raises:
        PluginError: it is no positive number.
    """
    value = options.get("timeout_s", default_s)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise _invalid("timeout_s", value, "a positive number of seconds")

    return float(value)


@dataclass(frozen=True, slots=True)
class Aggregation:
    """Reduction of the values of one name and rank within `every` steps to their mean, min, max, sum, or the last."""

    every: int
    by: str


@dataclass(frozen=True)
class DeliveryFilter:
    """Filters of one backend."""

    # Patterns of names of which one must match; empty accepts all. They apply to everything with a name.
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()  # patterns of names that are kept back, also when `include` accepts them
    # Pairs of (patterns of names, ranks) for values, texts, images, histograms and artifacts; one must match, an empty
    # part matches everything.
    routes: tuple[tuple[tuple[str, ...], frozenset[int]], ...] = ()
    sample: int = 1  # deliver the user's values of every `sample`-th step only
    aggregation: Aggregation | None = None  # reduction of the user's values
    _named: Any = field(init=False, repr=False, compare=False)
    _routed: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_named", lru_cache(_CACHED_NAMES)(self._passes_name))
        object.__setattr__(self, "_routed", lru_cache(_CACHED_NAMES)(self._passes_route))

    @classmethod
    def of(cls, include: Sequence[str], exclude: Sequence[str], options: Mapping[str, Any]) -> DeliveryFilter:
        """Return the filters of the settings `include` and `exclude` and of a backend's options.

        Raises:
            PluginError: an option is invalid; the text has its name, its value and what is allowed.
        """
        return cls(
            include=(*include, *_patterns(options, "include")),
            exclude=(*exclude, *_patterns(options, "exclude")),
            routes=tuple(_routes(options.get("routes"))),
            sample=_sample(options.get("sample", 1)),
            aggregation=_aggregation(options.get("aggregate")),
        )

    def takes(self, name: str, rank: int | None = None) -> bool:
        """Return whether something of this name passes.

        Args:
            name: name given by the user, without the rank.
            rank: rank of a value or anything else that routes apply to; None for parameters and tags.
        """
        return bool(self._named(name)) and (rank is None or bool(self._routed(name, rank)))

    def apply(self, rows: Iterable[Metric], stored: dict[str, Any], experiment: str) -> list[Metric]:
        """Return the values that pass, in order; aggregates when their window is complete.

        Args:
            stored: open windows by experiment, changed in place; plain values for JSON.
        """
        passing = (row for row in rows if self.takes(row.name, row.rank) and (row.step or 0) % self.sample == 0)
        if self.aggregation is None:
            return list(passing)

        return list(self._aggregated(passing, stored, experiment))

    def finish(self, stored: dict[str, Any], experiment: str) -> list[Metric]:
        """Close the windows of an experiment and return their aggregates."""
        return [_closed(window) for window in stored.pop(experiment, {}).values()]

    def _passes_name(self, name: str) -> bool:
        return not matches(self.exclude, name) and (not self.include or matches(self.include, name))

    def _passes_route(self, name: str, rank: int) -> bool:
        if not self.routes:
            return True

        return any((not ranks or rank in ranks) and (not names or matches(names, name)) for names, ranks in self.routes)

    def _aggregated(self, rows: Iterable[Metric], stored: dict[str, Any], experiment: str) -> Iterator[Metric]:
        assert self.aggregation is not None
        windows = stored.setdefault(experiment, {})
        for row in rows:
            key, number = f"{row.rank}/{row.name}", (row.step or 0) // self.aggregation.every
            window = windows.get(key)
            if window is not None and window["window"] == number:
                _add(window, row)
                continue
            if window is not None:
                yield _closed(window)

            windows[key] = {
                "window": number, "by": self.aggregation.by, "value": row.value, "n": 1,
                "row": [row.name, row.step, row.timestamp, row.rank, row.kind],
            }  # fmt: skip


def _add(window: dict[str, Any], row: Metric) -> None:
    old, new, by = window["value"], row.value, window["by"]
    if by == "last":
        window["value"] = new
    elif by in {"mean", "sum"}:
        window["value"] = old + new
    elif math.isnan(old) or (not math.isnan(new) and (new < old) == (by == "min")):
        window["value"] = new  # a number replaces NaN

    window["n"] += 1
    window["row"][1:3] = [row.step, row.timestamp]


def _closed(window: dict[str, Any]) -> Metric:
    name, step, timestamp, rank, kind = window["row"]
    value = window["value"] / window["n"] if window["by"] == "mean" else window["value"]
    return Metric(name, value, step, timestamp, rank, kind)


# --- options ---------------------------------------------------------------------------------------------------------


def matches(patterns: Iterable[str], name: str) -> bool:
    """Return whether a name matches one of these patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _invalid(key: str, value: Any, allowed: str) -> PluginError:
    return PluginError(f"option {key!r} of a backend is {value!r:.100}; allowed: {allowed}")


def _patterns(options: Mapping[str, Any], key: str, example: str = "train/*") -> tuple[str, ...]:
    value = options.get(key, ())
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
        raise _invalid(key, value, f'a list of patterns, such as ["{example}"]')

    return tuple(value)


def _routes(value: Any) -> Iterator[tuple[tuple[str, ...], frozenset[int]]]:
    allowed = 'names and ranks, such as {names = ["val/*"], ranks = [0]}, or a list of these'
    for route in value if isinstance(value, list | tuple) else [value] if value is not None else []:
        if not isinstance(route, Mapping) or not set(route) <= {"names", "ranks"}:
            raise _invalid("routes", value, allowed)

        ranks = route.get("ranks", ())
        ranks = [ranks] if isinstance(ranks, int) else ranks
        if not isinstance(ranks, list | tuple) or not all(type(rank) is int for rank in ranks):
            raise _invalid("routes", value, allowed)

        yield _patterns(route, "names"), frozenset(ranks)


def _sample(value: Any) -> int:
    """Return the sampling period in steps: 10 and 0.1 both mean every tenth step."""
    if type(value) is int and value >= 1:
        return value
    if isinstance(value, float) and 0 < value <= 1:
        return round(1 / value)

    raise _invalid("sample", value, "a period in steps (10), or a share of the steps (0.1)")


def _aggregation(value: Any) -> Aggregation | None:
    if value is None:
        return None

    if isinstance(value, Mapping) and set(value) <= {"every", "by"}:
        every, by = value.get("every"), value.get("by", "mean")
        if type(every) is int and every >= 1 and by in _AGGREGATES:
            return Aggregation(every, by)

    raise _invalid(
        "aggregate", value, f'steps and aggregate, such as {{every = 100, by = "mean"}}; by: {", ".join(_AGGREGATES)}'
    )
