"""Jobs on this host: `traceml run` and what it keeps alive beside the job (aggregator, web page).

Runs in the command's process; `elastic` runs in torchrun's. May import `display` and the packages below it.
`X_process.py` is the handle in the parent; the process itself is X's `__main__.py`.
"""
