"""Jobs over many hosts; one folder per process, and `shared/` for what several of them run.

Process: `launcher/` in the caller of `launch`; `agent/` in the agent of each host; `worker/` in the zygote there and
the workers that it forks; each file of `shared/` in those that its line `Process:` names. A file elsewhere with such a
line runs in another process than its folder. May import the packages below; `tests/test_packages.py` lists which folder
may import which, and compares the lines of `shared/` with the files that import them.

A launch that hangs on one host: `launcher.job.job` waits for each step of the start-up (`_gather`, `_await`) and says
who is late; `launcher.job.job_host` has the host's state (`activity`). More: docs/launch.md, "When a launch hangs".
"""
