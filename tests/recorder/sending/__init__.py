"""Rows and files on their way to the aggregator."""
