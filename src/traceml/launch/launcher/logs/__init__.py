"""Output of workers and agents: routed to files, the screen and the user's handlers; the protocol's debug log.

Process: launcher. May import `launch.shared`.
"""
