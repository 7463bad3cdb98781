"""Measures of samples against data. None of them knows a diffusion: tensors in, numbers out."""
