"""One process that stores every rank's rows once, judges them while they come, and notices ranks that went silent."""
