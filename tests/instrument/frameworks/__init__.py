"""Tests of facts about the script."""
