"""Pure functions: windows of steps in, findings out."""
