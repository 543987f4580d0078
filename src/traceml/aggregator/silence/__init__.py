"""Ranks that do not answer: looked at from outside, by a process of their host."""
