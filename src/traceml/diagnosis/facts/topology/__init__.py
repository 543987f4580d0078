"""Place of each rank: host, switches, NVLink domain, coordinates of the device mesh.

Gathered in the aggregator and by readers. Imports `database`.
"""
