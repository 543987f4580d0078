"""Report of an evaluation that takes long: it has a row only when the training continues."""

from __future__ import annotations

from traceml.clock import monotonic_ns
from traceml.database.info_kinds import InfoKind, InfoSender

__all__ = ["LongEvaluation"]

_LONG_NS = 5_000_000_000


class LongEvaluation:
    """Reports each long evaluation once, while it runs.

    Args:
        note: appends a row to `info`.
    """

    def __init__(self, note: InfoSender) -> None:
        self._note = note
        self._since_ns = 0  # 0 outside
        self._is_reported = False

    def __call__(self, *, is_evaluating: bool) -> None:
        """Take whether an evaluation runs; called in each cycle of the recorder."""
        if not is_evaluating:
            self._since_ns, self._is_reported = 0, False
            return

        now = monotonic_ns()
        self._since_ns = self._since_ns or now
        if not self._is_reported and now - self._since_ns >= _LONG_NS:
            self._is_reported = True
            self._note(InfoKind.EVALUATING, since_ns=self._since_ns)  # its row of `evals` may end before now
