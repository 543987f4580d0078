"""Media on which views are shown."""
