"""Weights brought for a moment: the same results, in bytes that were spare, and gone afterwards."""

from pathlib import Path

import pytest
import torch
from lowvram_video.memory.stream.transient_weights import TransientWeights
from lowvram_video.wanvideo.checkpoint import load_wan, open_wan
from lowvram_video.wanvideo.streamed import StreamedWan

from . import tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize("variant", ["t2v", "flf2v"])
def test_a_model_whose_embeddings_are_lent_computes_the_same(tmp_path: Path, variant: str) -> None:
    path = tiny.save_wan(tmp_path / "wan.safetensors", variant)
    model, config = load_wan(path), tiny.CONFIGS[variant]
    latent = torch.randn(1, config.in_channels, 2, 8, 8)
    text = torch.randn(1, 512, config.text_dim)
    image = torch.randn(1, 514, 1280) if config.image_dim else None
    timestep = torch.tensor([400.0])
    want = model(latent, timestep, text, image)
    _, checkpoint = open_wan(path)
    modules = {name: part for name in StreamedWan.parts.transient if (part := getattr(model, name)) is not None}
    weights = TransientWeights(checkpoint, modules, CPU, None)
    for part in modules.values():
        part.to("meta")
    model.bring = weights
    assert torch.equal(model(latent, timestep, text, image), want)
    assert all(p.is_meta for part in modules.values() for p in part.parameters())
    weights.release()


def test_spare_bytes_are_used_and_missing_ones_allocated(tmp_path: Path) -> None:
    path = tiny.save_wan(tmp_path / "wan.safetensors")
    model = load_wan(path)
    _, checkpoint = open_wan(path)
    weights = TransientWeights(checkpoint, {"time_embedding": model.time_embedding}, CPU, None)
    want = checkpoint.read("time_embedding.2.weight")
    spare = torch.zeros(1 << 20, dtype=torch.uint8)
    with weights((model.time_embedding,), spare):
        weight = model.time_embedding[2].weight
        assert spare.data_ptr() <= weight.data_ptr() < spare.data_ptr() + spare.numel()
        assert torch.equal(weight, want)
    with weights((model.time_embedding,), spare[:100]):
        assert torch.equal(model.time_embedding[2].weight, want)


@torch.inference_mode()
def test_spare_bytes_of_an_inference_tensor_serve_too(tmp_path: Path) -> None:
    path = tiny.save_wan(tmp_path / "wan.safetensors")
    model = load_wan(path)
    _, checkpoint = open_wan(path)
    weights = TransientWeights(checkpoint, {"time_embedding": model.time_embedding}, CPU, None)
    with weights((model.time_embedding,), torch.zeros(1 << 20, dtype=torch.uint8)):
        assert torch.equal(model.time_embedding[0].bias, checkpoint.read("time_embedding.0.bias"))


def test_an_error_in_between_takes_the_weights_back(tmp_path: Path) -> None:
    path = tiny.save_wan(tmp_path / "wan.safetensors")
    model = load_wan(path)
    _, checkpoint = open_wan(path)
    weights = TransientWeights(checkpoint, {"text_embedding": model.text_embedding}, CPU, None)
    with pytest.raises(KeyboardInterrupt), weights((model.text_embedding,), None):
        raise KeyboardInterrupt
    assert model.text_embedding[0].weight.is_meta
