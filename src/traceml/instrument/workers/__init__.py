"""Worker processes of data loaders: what is set up in them, which there are, and which died.

Runs in the rank. May import what `instrument` may.
"""
