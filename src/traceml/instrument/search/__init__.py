"""Search for what the script has made: models, optimizers, and iterators that give batches."""
