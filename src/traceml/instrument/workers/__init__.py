"""Worker processes of data loaders: which there are, and which died.

Runs in the rank. May import what `instrument` may.
"""
