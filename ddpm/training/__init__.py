"""Training: the protocol of a task, and one objective a file in `tasks`."""
