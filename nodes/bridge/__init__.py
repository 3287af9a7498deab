"""Everything that knows ComfyUI's insides: its memory management, its models, its patches."""
