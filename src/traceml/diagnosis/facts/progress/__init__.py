"""Progress of the ranks, as rows and looks tell it."""
