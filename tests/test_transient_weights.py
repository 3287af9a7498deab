"""Weights brought for a moment: the same results, in bytes that were spare, and gone afterwards."""

from pathlib import Path

import pytest
import torch
from lowvram_video.memory.plan.footprint import WorkSize
from lowvram_video.memory.plan.limits import limits_for
from lowvram_video.memory.stream.transient_weights import TransientWeights
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.transformer.transformer import HereAlready
from lowvram_video.wanvideo.checkpoint import open_wan
from lowvram_video.wanvideo.streamed import StreamedWan
from lowvram_video.weights.linear import linear
from lowvram_video.weights.linear.fp8 import Fp8Dequantized
from lowvram_video.weights.linear.linear import Linear
from torch import nn

from . import tiny
from .tiny import load_wan

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


class Stored:
    """A checkpoint of a module's own tensors."""

    def __init__(self, prefix: str, module: nn.Module):
        self._tensors = {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}

    @property
    def tensors(self) -> dict[str, object]:
        return {name: Info(tensor) for name, tensor in self._tensors.items()}

    def read_into(self, name: str, out: torch.Tensor) -> None:
        out.copy_(self._tensors[name].flatten().view(torch.uint8))


class Info:
    """What a header says of a tensor."""

    file, offset = Path("any"), 0

    def __init__(self, tensor: torch.Tensor):
        self.dtype, self.shape, self.nbytes = tensor.dtype, tuple(tensor.shape), tensor.nbytes


def layer_of(kind: str) -> Linear:
    """A layer of 100 rows as files store such, with a LoRA of as many ranks as it has rows where so named."""
    randn = torch.Generator().manual_seed(0)
    layer = Linear(48, 100, bias=kind != "no bias", dtype=torch.float32)

    def normal(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(*shape, generator=randn), requires_grad=False)

    layer.weight = normal(100, 48)
    if layer.bias is not None:
        layer.bias = normal(100)
    if kind.startswith("fp8"):
        layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
        layer.format = Fp8Dequantized()
        shape = {"fp8": (), "fp8 one": (1,), "fp8 rows": (100,), "fp8 columns": (100, 1)}[kind]
        layer.register_parameter("weight_scale", nn.Parameter(torch.rand(shape, generator=randn), requires_grad=False))
    if kind == "lora":
        layer.register_parameter("lora_down", normal(100, 48))
        layer.register_parameter("lora_up", normal(100, 100))
        layer.register_buffer("lora_scale", torch.rand(100, generator=randn), persistent=False)
    return layer


@pytest.mark.parametrize("kind", ["plain", "no bias", "fp8", "fp8 one", "fp8 rows", "fp8 columns", "lora"])
@pytest.mark.parametrize("spare_bytes", [0, 1 << 16])
def test_a_layer_brought_some_rows_at_a_time_multiplies_as_the_whole_one(
    kind: str, spare_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "PIECE_ROWS", 32)
    layer, x = layer_of(kind), torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(1))
    whole = layer(x)
    module = nn.Sequential(nn.SiLU(), layer)
    here = layer.multiply_pieces(x, HereAlready().pieces(layer, None))
    weights = TransientWeights(Stored("module", module), {"module": module}, CPU, None)
    seen = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for name in list(layer._parameters):
        if layer._parameters[name] is not None:
            layer._parameters[name] = nn.Parameter(seen[name].to("meta"), requires_grad=False)
    spare = torch.zeros(spare_bytes, dtype=torch.uint8)
    brought = layer.multiply_pieces(x, weights.pieces(layer, spare))
    assert torch.equal(brought, here), "the same bits wherever it lies"
    torch.testing.assert_close(here, whole)
    assert all(tensor.is_meta for tensor in layer.parameters())
    largest, _ = layer.piece_bytes(torch.float32)
    assert (spare.count_nonzero() > 0) == (largest <= spare_bytes)
    weights.release()


def test_what_is_brought_counts_as_host_memory_of_its_model_on_every_card(tmp_path: Path) -> None:
    """Or the next plan would take it for what others hold, and find too little RAM."""
    model = StreamedWan(tiny.save_wan(tmp_path / "wan.safetensors"), RunSettings(others=(CPU,)))
    model.start(model.make_plan(WorkSize(9, 64, 96), limits_for(CPU)))
    before = model.host_bytes
    for each in (model, *model._others):
        each.fixed.keep_away(["text_embedding"])
    assert model.host_bytes - before == 2 * model.fixed.host_bytes > 0
    model.release()
    assert model.host_bytes == 0
