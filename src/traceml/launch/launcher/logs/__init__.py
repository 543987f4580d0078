"""Output of workers and agents: routed to files, the screen and the user's handlers; the protocol's debug log.

Runs in the process that calls `launch`. Imports `launch.wire`.
"""
