"""A run as an object: found, read, followed, reported."""
