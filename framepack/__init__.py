"""FramePack: configuration, transformer, sections, VAE, checkpoint files, pipeline."""
