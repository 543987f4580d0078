"""Rows at rest: schemas, rings in the flight file, frames, and the store."""
