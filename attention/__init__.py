"""Attention backends and the choice between them."""
