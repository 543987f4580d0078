"""Views: from a run's data to what a person reads. No input or output here."""
