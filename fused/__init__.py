"""Fused elementwise operations of diffusion transformers."""
