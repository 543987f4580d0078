"""Merging of hosts: one message per host and second, from which the same rules give the same verdict."""
