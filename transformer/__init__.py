"""What both families' transformers share: their base, their layers, the workspace of a pass."""
