"""The script of `traceml demo`, alone in its folder: Python looks there first for what the script imports.

Runs in the ranks of the demonstration. May import torch and scikit-learn.
"""
