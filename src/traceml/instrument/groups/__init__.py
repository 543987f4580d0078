"""Process groups of torch.distributed: when the job's group exists, and the newest operation of each.

Runs in the rank. May import what `instrument` may.
"""
