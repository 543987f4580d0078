"""Periodic samples in a rank: process, host, devices, torch's allocator.

The room runs on the recorder's thread of each rank, and imports `database` and the leaf modules only.
"""
