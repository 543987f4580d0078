"""A process as another one sees it: its state in the kernel, and its Python stacks on a signal.

Runs in ranks, agents and aggregators. Imports nothing of traceml.
"""
