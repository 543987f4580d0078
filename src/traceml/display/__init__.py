"""The media that views are shown on."""
