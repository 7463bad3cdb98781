"""Latent variables: bounds on the likelihood of data by what is hidden behind them, and what a decoder says of data."""
