"""The built-in trackers; each module imports its library only when its backend is created."""
