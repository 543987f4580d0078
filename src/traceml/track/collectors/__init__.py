"""What is read about a run beside what it logs: git, environment, system; and the process in which collectors run."""
