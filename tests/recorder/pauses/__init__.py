"""Tests of the pauses that a rank records."""
