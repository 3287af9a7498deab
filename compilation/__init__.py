"""torch.compile for models whose weights are streamed."""
