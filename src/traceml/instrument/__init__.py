"""Hooks and patches on torch: the only room that touches its internals."""
