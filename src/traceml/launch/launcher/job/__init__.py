"""One launched job: states of its hosts and workers, the event loop, payloads, failures, tracing.

Process: launcher. May import `launcher.hosts`, `launcher.logs`, `launch.shared` and `supervise`.
"""
