"""A process as another one sees it: its state in the kernel, and its Python stacks on a signal. Frames of other threads.

Runs in ranks, agents, aggregators, and where tasks run. Imports nothing of traceml.
"""
