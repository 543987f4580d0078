"""The agent, one process per host: it starts workers through the zygote, forwards what they write, and ends them.

May import `launch.wire` and `database`: neither torch nor a package that shows or stores runs.
"""
