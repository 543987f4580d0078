"""The rank's half of tracking: the `log_*` calls, automatic capture of frameworks' logging, and collectors.

Runs in the training process, so it imports neither numpy nor SQLite nor a tracker's library. It imports `recorder`,
`instrument`, and of `track` the plugins and what the folder itself holds; nothing of `delivery` or `backends`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from traceml.fail_open import fail_open
from traceml.recorder.current import on_start

if TYPE_CHECKING:
    from traceml.recorder.recorder import Recorder

_log = logging.getLogger("traceml")


def _start_tracking(recorder: Recorder) -> None:
    """Start tracking with a recorder whose settings name trackers or collectors."""
    if recorder.is_child or not (recorder.config.backend or recorder.config.collectors):
        return

    with fail_open(_log, "track", "tracking could not be started"):
        from traceml.track.rank.capturing import on_recorder_start

        on_recorder_start(recorder)


on_start(_start_tracking)
