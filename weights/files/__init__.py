"""Checkpoint files: safetensors, shards, GGUF, and what a file is by its tensors, LoRAs by their keys."""
