"""Data to view models to text: what a run looks like, whoever shows it."""
