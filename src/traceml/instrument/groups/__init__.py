"""Process groups of torch.distributed: when the job's group exists, and the newest operation of each."""
