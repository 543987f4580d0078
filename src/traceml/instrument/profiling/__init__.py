"""A torch.profiler over steps of a running training."""
