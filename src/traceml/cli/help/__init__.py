"""Help on commands beyond their options: examples, and completion in the shell."""
