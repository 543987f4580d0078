"""The web page: a reader of the store in a process of its own, shown by NiceGUI, guarded by a token."""
