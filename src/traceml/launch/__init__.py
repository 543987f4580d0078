"""Starting the processes of a job, and staying with them to the end."""
