"""Objects of the script that grow while memory does.

Runs in the rank, on the recorder's thread. May import what `recorder` may.
"""
