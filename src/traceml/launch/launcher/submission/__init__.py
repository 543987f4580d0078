"""Submission of a launch to Slurm: the job's options, what it executes, and the handle of it.

Process: the submitter; `allocation_main` and `allocation_call` in the first process of the job.
May import `launch.launcher` and `supervise`.
"""
