"""Progress of the ranks, as rows and snapshots tell it."""
