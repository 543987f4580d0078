"""A rank that makes no progress: noticed, and described by snapshots, on the recorder's thread.

May import what `recorder` may.
"""
