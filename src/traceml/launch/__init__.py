"""Jobs over many hosts, by process: `launcher`, `agent` and `worker` each hold one process's code.

`wire` holds what two of these processes share. `tests/test_rooms.py` lists which may import which.
"""
