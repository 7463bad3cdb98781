"""`ddpm-train`: training, and all that is made and checked before it begins."""
