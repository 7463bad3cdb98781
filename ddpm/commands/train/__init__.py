"""`ddpm-train`: training, and what is built and checked before it starts."""
