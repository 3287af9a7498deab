"""Tiny random checkpoints in the real file formats, for tests that need files."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import sentencepiece
import torch
from lowvram_video.wanvideo.checkpoint import build_wan, open_wan
from lowvram_video.wanvideo.identity import WanFiles
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.network.model import WanModel
from lowvram_video.wanvideo.text.encoder import UMT5Config, UMT5Encoder
from lowvram_video.wanvideo.vae.model import WAN21_VAE, WAN22_VAE, VAEConfig, WanVAE
from lowvram_video.weights.linear.adopt import load_tensors
from safetensors.torch import save_file

TEXT_DIM = 32
CONFIGS = {
    "t2v": WanConfig("t2v", 128, 192, 1, 3, text_dim=TEXT_DIM, freq_dim=32),
    "i2v": WanConfig("i2v", 128, 192, 1, 3, in_channels=36, text_dim=TEXT_DIM, freq_dim=32),
    "i2v clip": WanConfig("i2v", 128, 192, 1, 3, in_channels=36, text_dim=TEXT_DIM, freq_dim=32, image_dim=1280),
    "flf2v": WanConfig(
        "flf2v", 128, 192, 1, 3, in_channels=36, text_dim=TEXT_DIM, freq_dim=32, image_dim=1280, image_pos_tokens=514
    ),
    "ti2v": WanConfig("ti2v", 128, 192, 1, 3, in_channels=48, out_channels=48, text_dim=TEXT_DIM, freq_dim=32),
}


def load_wan(path: str | Path) -> WanModel:
    """All of a transformer on the CPU, in the file's own dtypes. Raises CheckpointError."""
    config, checkpoint = open_wan(path)
    return load_tensors(build_wan(config, checkpoint), checkpoint)


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights of a scale that keeps activations near one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 0
        values = torch.randn(parameter.shape, generator=generator)
        if fan_in:
            values *= 0.7 / fan_in**0.5
        elif name.endswith(("norm_q.weight", "norm_k.weight", "gamma", "norm3.weight", "layer_norm.weight")):
            values = 1 + 0.1 * values
        else:
            values *= 0.05
        parameter.data = values
    return module


def save_wan(
    path: Path, variant: str = "t2v", seed: int = 0, dtype: torch.dtype = torch.float32, num_layers: int = 3
) -> Path:
    model = randomize(WanModel(replace(CONFIGS[variant], num_layers=num_layers)), seed)
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


def save_vae(path: Path, variant: str = "t2v") -> Path:
    published = WAN22_VAE if variant == "ti2v" else WAN21_VAE
    config: VAEConfig = replace(published, encoder_dim=8, decoder_dim=8)
    save_file({name: t.contiguous() for name, t in randomize(WanVAE(config)).state_dict().items()}, path)
    return path


def save_text_encoder(path: Path, ffn_dim: int = 64, num_layers: int = 2) -> Path:
    model = io.BytesIO()
    captions = ["a red ball moves left", "a blue square moves right", "two cats fight on a stage"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions * 20),
        model_writer=model, vocab_size=40, model_type="unigram", hard_vocab_limit=False,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, minloglevel=2,
    )  # fmt: skip
    encoder = randomize(UMT5Encoder(UMT5Config(64, TEXT_DIM, 64, ffn_dim, 1, num_layers)))
    encoder.register_module("shared", randomize(torch.nn.Embedding(64, TEXT_DIM), seed=1))
    tensors = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    tensors["spiece_model"] = torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8)
    save_file(tensors, path)
    return path


def save_files(folder: Path, variant: str = "t2v", experts: bool = False) -> WanFiles:
    """A model, its VAE and its text encoder; with `experts`, also a low-noise one."""
    return WanFiles(
        save_wan(folder / f"wan_{variant.replace(' ', '_')}.safetensors", variant),
        save_text_encoder(folder / "umt5.safetensors"),
        save_vae(folder / "vae.safetensors", variant),
        save_wan(folder / "wan_low.safetensors", variant, seed=1) if experts else None,
    )
