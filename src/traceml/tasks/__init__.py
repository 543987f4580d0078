"""Tasks on threads and an event loop, in the process that submits them: waits without deadlock, timeouts, counters.

Imports no other package of traceml, only the leaf modules.
"""
