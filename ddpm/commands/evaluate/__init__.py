"""`ddpm-evaluate`: the command and its measures."""
