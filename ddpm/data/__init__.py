"""Image sources, one a file."""
