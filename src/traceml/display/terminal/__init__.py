"""The terminal: the live panel below a script's output, and the full screen of `traceml top`.

Runs in the supervisor of `traceml run` and in `traceml top`. May import `renderers.text` and `runs`.
"""
