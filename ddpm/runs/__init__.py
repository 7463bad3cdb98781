"""What a run leaves, and how it is found again: directories, checkpoints, whole files, caches, shares of a machine."""
