"""Wan 2.1/2.2: configuration, transformer, VAE, text encoder, checkpoint files, pipeline."""
