"""One launched job: states of its hosts and workers, the event loop, payloads, failures, tracing.

Runs in the process that calls `launch`. Imports `launcher.hosts`, `launcher.logs`, `launch.wire` and `supervise`.
"""
