"""Tests of the findings about devices."""
