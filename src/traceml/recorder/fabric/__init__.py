"""Place of a rank's host in the cluster's network.

Runs in the rank, on the recorder's thread. May import what `recorder` may.
"""
