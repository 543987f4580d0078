"""Hosts of a launch: names and sizes, Slurm's allocation, connections to agents, idle agents kept for the next launch.

Process: launcher. May import `launch.shared`.
"""
