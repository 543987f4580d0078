"""Periodic samples in a rank: process, host, devices, torch's allocator.

Runs on the recorder's thread of each rank. Imports `database` and the leaf modules only.
"""
