"""Tasks on threads and an event loop, in the process that submits them: waits without deadlock, timeouts, counters.

The room imports no other room, only the leaf modules.
"""
