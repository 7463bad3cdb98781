"""Latent-variable models: codecs, the evidence lower bound, reconstruction and adversarial losses."""
