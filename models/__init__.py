"""The networks: tensors in, tensors out. Knows no schedule."""
