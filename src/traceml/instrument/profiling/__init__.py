"""A torch.profiler over steps of a running training.

Runs in the rank, on the thread that trains. May import what `instrument` may.
"""
