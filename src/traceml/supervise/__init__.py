"""Jobs on this host: `traceml run` and what it keeps alive beside the job (aggregator, web page).

Runs in the command's process; `elastic` runs in torchrun's. May import `display` and the rooms below it.
"""
