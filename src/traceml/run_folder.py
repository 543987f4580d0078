"""Names in the folder of a run. Light, as each rank imports it."""

from __future__ import annotations

__all__ = ["ARTIFACTS", "COPIES_FOLDER", "PAGE_NAME", "REPORT_NAME", "STORE_NAME"]

STORE_NAME = "store.db"
REPORT_NAME = "report.json"
PAGE_NAME = "report.html"
# Logged files, by their SHA-256.
ARTIFACTS = "artifacts"
# Copies of flight files from other hosts.
COPIES_FOLDER = "flights"
