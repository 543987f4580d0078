"""Numbers as people read them; each text has a bounded width, so columns stay where they are."""

from __future__ import annotations

__all__ = ["bytes_text", "count_text", "duration_text", "ms_text", "overhead_text", "percent_text", "rate_text"]

MISSING = "-"


def count_text(count: int | None) -> str:
    """Return `1,204`."""
    return MISSING if count is None else f"{count:,}"


def ms_text(ms: float | None) -> str:
    """Return three digits and a unit: `812 us`, `2.73 ms`, `27.3 ms`, `1.20 s`."""
    if ms is None:
        return MISSING

    if ms < 0.9995:
        return f"{ms * 1e3:.3g} us" if ms * 1e3 < 99.95 else f"{ms * 1e3:.0f} us"

    if ms < 999.5:
        return f"{_three_digits(ms)} ms"

    return f"{_three_digits(ms / 1e3)} s"


def rate_text(per_second: float | None) -> str:
    """Return steps per second: `0.21`, `36.6`, `1,204`."""
    if per_second is None:
        return MISSING

    return f"{per_second:,.0f}" if per_second >= 999.5 else _three_digits(per_second)


def bytes_text(size: int | None) -> str:
    """Return `412 MiB`, `1.20 GiB`."""
    if size is None:
        return MISSING

    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 999.5 or unit == "TiB":
            break
        value /= 1024

    return f"{value:.0f} {unit}" if unit in ("B", "KiB") else f"{_three_digits(value)} {unit}"


def percent_text(share: float | None) -> str:
    """Return a share 0..1 as `62 %`, `0.4 %`."""
    if share is None:
        return MISSING

    percent = 100 * share
    if 0 < percent < 0.1:
        return "<0.1 %"

    return f"{percent:.1f} %" if 0 < percent < 0.95 else f"{percent:.0f} %"


def duration_text(seconds: float | None) -> str:
    """Return `0.84 s`, `42 s`, `12:07`, `3:04:05`."""
    if seconds is None:
        return MISSING

    if seconds < 9.95:
        return f"{seconds:.1f} s"

    if seconds < 99.5:
        return f"{seconds:.0f} s"

    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def overhead_text(us_per_step: float | None, share: float | None) -> str:
    """Return what tracing costs: `5.1 us per step (0.02 %)`."""
    if us_per_step is None:
        return "not measured"

    return f"{us_per_step:.1f} us per step" + (f" ({_fine_percent(share)})" if share is not None else "")


def _fine_percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 9.95 else f"{percent:.1f} %" if percent >= 0.95 else f"{percent:.2g} %"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
