"""Checkpoint files and (quantised) linear layers."""
