"""Facts about the loaders, models and optimizers of the script, reported when they change.

Runs in the rank. May import what `instrument` may.
"""
