"""A process as another one sees it: its state in the kernel, its Python stacks on a signal, frames of its threads.

Runs in ranks, agents, aggregators, and where tasks run. Imports leaves only.
"""
