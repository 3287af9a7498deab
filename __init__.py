"""ComfyUI-LowVRAM-Video: Wan and FramePack video on small graphics cards."""
