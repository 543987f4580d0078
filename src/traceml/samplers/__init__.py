"""Samplers: what is read every so often in a rank - process, host, devices, torch's allocator."""
