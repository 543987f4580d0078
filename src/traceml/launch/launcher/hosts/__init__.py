"""Hosts of a launch: names and sizes, Slurm's allocation, connections to agents, idle agents kept for the next launch.

Runs in the process that calls `launch`. Imports `launch.wire`.
"""
