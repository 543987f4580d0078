"""What can go wrong, as one tree.

TraceMLError
├── SettingsError                 (ValueError)     a setting has an unknown name or a bad value
├── AggregatorUnavailableError    (ConnectionError) no aggregator answered within the time allowed
├── AggregatorRefusedError        (ConnectionError) an aggregator answered and refused: token, version, limits
├── ProtocolError                 (ValueError)     bytes on the wire that are not ours or not this version's
├── RunNotFoundError              (LookupError)    no run where the user pointed
├── StoreError                    (OSError)        a run's store cannot be written or read
└── UsageError                    (ValueError)     a command was called wrongly
"""

from __future__ import annotations

__all__ = [
    "AggregatorRefusedError",
    "AggregatorUnavailableError",
    "ProtocolError",
    "RunNotFoundError",
    "SettingsError",
    "StoreError",
    "TraceMLError",
    "UsageError",
]


class TraceMLError(Exception):
    """Base of every error that traceml raises on purpose."""


class SettingsError(TraceMLError, ValueError):
    """A setting has an unknown name or a value that is not allowed.

    Args:
        key: the setting, as written by the user.
        problem: what is wrong with it.
        source: where it came from: `argument`, an environment variable's name, or a file's path.
        allowed: what would be accepted.
    """

    def __init__(self, key: str, problem: str, *, source: str, allowed: str) -> None:
        super().__init__(f"{key}: {problem} (from {source}). Allowed: {allowed}")
        self.key, self.problem, self.source, self.allowed = key, problem, source, allowed


class AggregatorUnavailableError(TraceMLError, ConnectionError):
    """No aggregator answered at the address within the time allowed."""

    def __init__(self, host: str, port: int, waited_s: float, reason: str) -> None:
        super().__init__(
            f"no traceml aggregator answered at {host}:{port} within {waited_s:.1f} s (last try: {reason}). "
            "Start one with `traceml serve`, let this job start its own with traceml.init(local=True), "
            "or turn tracing off with TRACEML_ENABLED=0."
        )
        self.host, self.port, self.waited_s, self.reason = host, port, waited_s, reason


class AggregatorRefusedError(TraceMLError, ConnectionError):
    """An aggregator answered and refused this peer; trying again would not help."""

    def __init__(self, host: str, port: int, why: str) -> None:
        super().__init__(f"the traceml aggregator at {host}:{port} refused the connection: {why}")
        self.host, self.port, self.why = host, port, why


class ProtocolError(TraceMLError, ValueError):
    """Bytes on the wire that are not ours, or not of this version."""


class RunNotFoundError(TraceMLError, LookupError):
    """There is no run where the user pointed."""


class StoreError(TraceMLError, OSError):
    """A run's store cannot be written or read."""


class UsageError(TraceMLError, ValueError):
    """A command was called wrongly; the text is one line and a hint."""
