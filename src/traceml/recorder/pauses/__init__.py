"""Pauses of the training, as rows: garbage collections, compilations by torch.compile, checkpoints.

Runs in the rank. May import what `recorder` may.
"""
