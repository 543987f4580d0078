"""The C library of the scanner and of the aggregation kernels, and its loader.

Runs where traces are analyzed. Imports nothing of traceml.
"""
