"""Processes as others see them."""
