"""The processes that import torch on each host: the zygote, which computes nothing, and the workers it forks.

May import `launch.wire` and, where the job is traced, what starts the recorder.
"""
