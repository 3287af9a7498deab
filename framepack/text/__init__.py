"""Prompts and pictures as FramePack reads them: LLaMA 3 and CLIP text encoders, SigLIP vision, their tokenizers."""
