"""Process groups of torch.distributed."""
