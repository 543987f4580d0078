"""Rows and files on their way to the aggregator: connecting, cursors, resends, uploads; on the recorder's thread.

May import what `recorder` may.
"""
