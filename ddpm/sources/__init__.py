"""Sources of samples: a network with a sampler, a decoder, a distribution of codes, a pipeline."""
