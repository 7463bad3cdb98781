"""Measures that compare samples with data. None of them depends on diffusion: tensors in, numbers out."""
