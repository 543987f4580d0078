"""Ends of ranks, of loader workers and of the job, as processes and launchers report them.

Gathered in the aggregator and by readers. Imports `database`.
"""
