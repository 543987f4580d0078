"""Jobs on this host: `traceml run`, and the helper processes of a job or an aggregator.

Runs in the process of the command; `elastic` and `torchrun_logs` run in torchrun's. `otlp_process` and `report_process`
are used by `traceml serve` alone, so they run in the aggregator's process. May import `display` and the packages below.
`X_process.py` is the handle in the parent; the process itself is X's `__main__.py`, or `display/report_main.py`.
"""
