"""Place of each rank: host, switches, NVLink domain, coordinates of the device mesh."""
