"""Worker processes of data loaders: which there are, and which died."""
