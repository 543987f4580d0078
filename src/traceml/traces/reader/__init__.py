"""Trace files in, batches of columns out: discovery, decompression, scanning, salvage of damaged files.

Runs where traces are analyzed, in threads of its own. Imports `traces.native` only.
"""
