"""Networks: tensors in, tensors out, independent of any noise schedule."""
