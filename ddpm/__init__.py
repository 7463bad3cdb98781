"""Denoising diffusion probabilistic models: the mathematics and the training machinery, independent of any network."""

NUMERICS = 1  # raised by every change that alters results; part of every run's hash
