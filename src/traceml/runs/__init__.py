"""A run as an object: found, followed, loaded, reported."""
