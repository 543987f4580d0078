"""The process that calls `launch`: hosts, connections to their agents, the state of the job, logs, errors, tracing.

May import `launch.wire` and the packages below `launch`; starts agents by a command line, never by an import.
"""
