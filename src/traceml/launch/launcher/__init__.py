"""The caller of `launch`: hosts, connections to their agents, the state of the job, logs, errors, tracing.

Process: launcher, which is a script, a notebook, `traceml launch`, or the first process of a submitted job.
May import `launch.shared`, `supervise`, `recorder` and `database`; starts agents by a command line, never by an import.

A launch that hangs on one host: `job.job` waits for each step of the start-up (`_gather`, `_await`) and says who is
late; `job.job_host` has the host's state (`activity`); `hosts.agent_connection` starts the agent and says why it
failed.
"""
