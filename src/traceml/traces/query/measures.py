"""Measures of groups: the usual ones, and those that are computed on request."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from traceml.errors import UsageError
from traceml.traces.query.expressions import ARGS

__all__ = ["USUAL", "Measure", "parse_measures"]

USUAL = ("count", "sum", "mean", "min", "max", "p50", "p99", "self")
_SPREAD = {"std": "std_us", "var": "var_us2"}
_QUANTILE = re.compile(r"p(\d{1,2}(?:\.\d{1,4})?|100)$")
_SUM_OF = f"sum:{ARGS}"


@dataclass(frozen=True, slots=True)
class Measure:
    """One number of each group."""

    name: str  # as asked for: `count`, `p99.9`, `std`, `sum:args.size`

    @property
    def column(self) -> str:
        """Its name in rows and in JSON, with the unit."""
        if self.name == "count" or self.arg is not None:
            return self.name

        return _SPREAD.get(self.name, f"{self.name}_us")

    @property
    def quantile(self) -> Fraction | None:
        """The share of spans at most as long, from 0 to 1; None if it is not a quantile."""
        found = _QUANTILE.match(self.name)
        return None if found is None else Fraction(found[1]) / 100

    @property
    def arg(self) -> str | None:
        """The key of `args` that is summed; None if it is not such a sum."""
        return self.name.removeprefix(_SUM_OF) if self.name.startswith(_SUM_OF) else None

    @property
    def needs_squares(self) -> bool:
        """Whether it is computed from squares of durations."""
        return self.name in _SPREAD


def parse_measures(names: Iterable[str], where: str = "agg") -> tuple[Measure, ...]:
    """Return measures by name; each one once.

    Args:
        names: one of USUAL, std, var, pN for a percentile, sum:args.KEY.
        where: the argument, for errors.

    Raises:
        UsageError: there is no such measure.
    """
    chosen = tuple(dict.fromkeys(name.strip() for name in names))
    for name in chosen:
        known = name in USUAL or name in _SPREAD or _QUANTILE.match(name) or Measure(name).arg
        if not known:
            raise UsageError(
                f"{where}: there is no measure {name!r}. There are {', '.join((*USUAL, *_SPREAD))}, percentiles as in "
                "p95 or p99.9, and sums of arguments as in sum:args.size"
            )

    return tuple(map(Measure, chosen))
