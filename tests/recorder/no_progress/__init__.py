"""Ranks without progress."""
