"""Many jobs over many workers: processes here, Ray actors, ComfyUI servers; nothing of what a job makes."""
