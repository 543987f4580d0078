"""The part that lives in the training process, one per rank."""
