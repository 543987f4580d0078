"""Values that steps train on: sizes and fingerprints of batches, losses.

Runs in the rank; imports the other modules of `instrument` and `database`.
"""
