"""Runs as tidy frames: read from their directories, and laid out as matrices."""
