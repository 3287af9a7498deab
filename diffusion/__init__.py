"""What the video transformers share: run settings, buffers of a pass, layers, and weights that stream."""
