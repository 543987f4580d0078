"""The terminal as a device: the panel below a script's output, the full screen of `traceml top`, and its keys.

The lines that are drawn are made in `renderers/text/`: by `live_panel`, `top_tables` and `top_screen`.

Runs in the supervisor of `traceml run` and in `traceml top`. May import `renderers.text` and `runs`.
"""
