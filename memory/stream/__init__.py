"""Blocks on their way: from RAM or the disk through pinned memory into the device's ring."""
