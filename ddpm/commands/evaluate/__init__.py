"""`ddpm-evaluate`: measures."""
