"""Search for what the script has made: models, optimizers, and iterators that give batches.

Runs in the rank. May import what `instrument` may.
"""
