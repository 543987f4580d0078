"""Submission of a launch to Slurm: the job's options, what it executes, and the handle of it.

Runs in the process that submits and, `allocation_call` and `allocation`, in the job. Imports `launch.launcher` and
`launch.wire`.
"""
