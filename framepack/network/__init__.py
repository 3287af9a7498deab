"""FramePack's transformer as the paper draws it: no device, no memory, no files."""
