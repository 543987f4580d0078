"""The web page: NiceGUI behind a token, fed from the stores on disk.

Runs in a process of its own, started by `traceml serve --web` or `run --live web`. May import `renderers` and `runs`.
"""
