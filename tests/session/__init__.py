"""Tests of the session package."""
