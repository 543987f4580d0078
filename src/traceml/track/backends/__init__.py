"""The built-in trackers, one module each.

Runs in delivery processes; a module imports its tracker's library only when a run starts. It imports `track.plugins`.
"""
