"""HunyuanVideo's VAE, which FramePack shares."""
