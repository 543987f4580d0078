"""Tests of the findings about pauses."""
