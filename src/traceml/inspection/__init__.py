"""A process as another one sees it: its state in the kernel, its Python stacks on a signal, frames of its threads.

Also the script that it runs: its age, its files, the commit of its repository.

Runs in ranks, agents, aggregators, and where tasks run. Imports leaves only.
"""
