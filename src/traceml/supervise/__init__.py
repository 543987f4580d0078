"""Jobs on this host: `traceml run`, and the helper processes of a job or an aggregator.

Process: the command, which is `traceml run`, or the launcher of a traced launch; a file with a line `Process:` runs in
another one. May import `display`, `renderers`, `transport` and `database`.
`X_process.py` is the handle in the parent, and names the module of the process itself. `restarting_process.py` has the
base of most handles.
"""
