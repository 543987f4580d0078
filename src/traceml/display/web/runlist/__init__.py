"""Parts of the list of runs: its query, its table, and changes of the runs that are picked."""
