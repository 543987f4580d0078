"""Lines of the user's code that the training thread runs, and its loader workers while they make batches.

Runs in the rank, on the recorder's thread; `worker_lines` also in loader workers. May import what `recorder` may.
"""
