"""Measures of samples against data."""
