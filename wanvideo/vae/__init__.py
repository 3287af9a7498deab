"""Wan's causal VAE, 2.1 and 2.2."""
