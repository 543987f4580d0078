"""Adapters for training frameworks: one added line traces a training and shows its verdict.

Runs in the training process (`ray.trace` also in Ray's driver). Imports `session`, `runs`, `track` and `recorder`.
"""
