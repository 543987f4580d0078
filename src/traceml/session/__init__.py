"""Start and end of a traced training: `traceml.init`, and the entry point that runs a script as `python` does.

Runs in the training process. May import `recorder`, `track` and `transport`, and `display` when a user asks to
see the run, `runs` for its summary.
"""
