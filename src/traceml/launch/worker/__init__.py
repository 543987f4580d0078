"""The processes that import torch on each host: the zygote, which computes nothing, and the workers it forks.

Process: workers; `zygote` runs in the zygote. The zygote imports all, so that workers need not.
May import `launch.shared` and, where the job is traced, what starts the recorder.
"""
