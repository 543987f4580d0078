"""Jobs over many hosts, by process: `launcher`, `agent` and `worker` each hold one process's code.

`wire` holds what two of these processes share. `tests/test_rooms.py` lists which may import which.

A launch that hangs on one host: `launcher.job.job` has the states that each host goes through, and its errors name the
state; `launcher.hosts.agent_connection` starts the agent there and says why it failed.
"""
