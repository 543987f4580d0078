"""Adapters for the frameworks that people train with: one added line, and the run explains itself."""
