"""Memory: the plan, pinned host buffers, the device ring, the block streamer, reports."""
