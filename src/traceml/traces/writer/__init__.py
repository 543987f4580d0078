"""The trace writer: spans, instants and counters to a file that other tools read.

Runs in any Python program, and in exports of runs. Imports neither numpy nor another part of `traces`.
"""
