"""Hooks that time the steps and phases of an unmodified training loop. Runs in the rank.

`install` is the only entry. It never imports torch: modules already imported are instrumented now, the others when the
script imports them. May import `database` and leaf modules.
"""

from __future__ import annotations

from traceml.instrument.install import Instrumentation, install
from traceml.instrument.user_phases import traced

__all__ = ["Instrumentation", "install", "traced"]
