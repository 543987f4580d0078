"""The agent, one process per host: it starts workers through the zygote, forwards what they write, and ends them.

Process: agent; `reaper` continues in the agent's parent, `zygote_client` is the agent's end of the zygote.
May import `launch.shared` and `database`: neither torch nor a package that shows or stores runs.
"""
