"""Steps and phases of a training loop that was not written for it: hooks, patches, and the clock behind them.

`install` is the only entry. Torch is never imported from here: what is there is instrumented now, the rest as soon as
the script has imported it.
"""

from __future__ import annotations

from traceml.instrument.install import Instrumentation, install
from traceml.instrument.user import traced

__all__ = ["Instrumentation", "install", "traced"]
