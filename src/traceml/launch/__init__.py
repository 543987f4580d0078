"""Jobs over many hosts, by process: `launcher`, `agent` and `worker` each hold one process's code, or a file says so.

`wire` holds what two of these processes share. `tests/test_rooms.py` lists which may import which.

A launch that hangs on one host: `launcher.job.job` has the states that each host goes through. `launcher.job.job_host`
names the present one in errors and in the log of `TRACEML_LOG_LEVEL=debug`. `launcher.hosts.agent_connection` starts
the agent there and says why it failed.
"""
