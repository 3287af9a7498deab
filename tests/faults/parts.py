"""What reads the parts of models that are files of their own: vision, VACE, tiny decoders, and FlashVSR's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from lowvram_video.vae.tiny import TINY_16, TinyVAE
from lowvram_video.vae.tiny_files import TINY_FORMAT
from lowvram_video.wanvideo.checkpoint import open_wan
from lowvram_video.wanvideo.clip_vision import ClipVisionConfig, ClipVisionModel, open_clip_vision
from lowvram_video.wanvideo.network.model import WanModel
from lowvram_video.wanvideo.streamed import StreamedWan
from lowvram_video.wanvideo.upscale.decoder import DECODER_FORMAT
from lowvram_video.wanvideo.upscale.projection import PROJECTION_FORMAT
from lowvram_video.wanvideo.upscale.request import UpscaleFiles
from lowvram_video.wanvideo.upscale.run import Upscaler, prompt_of
from lowvram_video.weights.files.open import open_checkpoint
from safetensors.torch import save_file

from ..quantizers import quantize, write_gguf
from ..tiny import CONFIGS, randomize
from ..tiny_flashvsr import save_flashvsr
from . import mutations
from .files import Files
from .kept_upscaling import KeptUpscaling
from .reader import CPU, SETTINGS, Read, Reader, inspect, mutated

VISION = ClipVisionConfig(dim=64, ffn_dim=96, num_heads=1, num_layers=2, image_size=28)
VACE = replace(CONFIGS["t2v"], model_type="vace", num_layers=4, vace_layers=2, vace_channels=96)
WIDE_WAN = replace(CONFIGS["t2v"], dim=256, ffn_dim=256, num_heads=2, num_layers=1)
DECODER = replace(TINY_16, widths=(16, 12, 8, 8))


def parts_of_models(files: Files, place: Path) -> Mapping[str, Reader]:
    """All of them; what they are made of is put into `place`."""
    place.mkdir(parents=True)
    flashvsr = save_flashvsr(place / "flashvsr")
    base, module = _vace(place)
    tensors: dict[str, tuple[Path, tuple[Read, ...]]] = {
        "CLIP vision": (_vision(place / "clip_vision_h.safetensors"), (inspect, open_clip_vision)),
        "VACE module": (module, (inspect, lambda path: StreamedWan(base, SETTINGS, vace_module=path))),
        "tiny decoder": (_tiny_decoder(place / "taew2_1.safetensors"), (inspect, as_tiny_decoder)),
        "FlashVSR": (flashvsr.model, (inspect, as_part(flashvsr, "model"))),
        "FlashVSR's projection": (flashvsr.projection, (inspect, as_part(flashvsr, "projection"), as_projection)),
        "FlashVSR's decoder": (flashvsr.decoder, (inspect, as_part(flashvsr, "decoder"), as_decoder)),
        "FlashVSR's prompt": (flashvsr.prompt, (inspect, as_part(flashvsr, "prompt"))),
    }
    found = {name: Reader(mutated(path, mutations.safetensors), reads) for name, (path, reads) in tensors.items()}
    gguf = _wan_gguf(place / "wan.gguf")
    return {
        **found,
        "GGUF of Wan": Reader(mutated(gguf, mutations.gguf), (inspect, open_wan)),
        "FlashVSR's kept run": KeptUpscaling(flashvsr, place / "kept_upscaling").reader,
    }


def as_tiny_decoder(path: Path) -> None:
    TINY_FORMAT.open_file(path).build(torch.float32, CPU)


def as_projection(path: Path) -> None:
    PROJECTION_FORMAT.open_file(path).build(torch.float32, CPU)


def as_decoder(path: Path) -> None:
    DECODER_FORMAT.open_file(path).build(torch.float32, CPU)


def as_part(files: UpscaleFiles, part: str) -> Read:
    """One of FlashVSR's files beside the three others."""

    def read(path: Path) -> None:
        Upscaler(replace(files, **{part: path}), SETTINGS)
        if part == "prompt":
            prompt_of(open_checkpoint(path))

    return read


# --- what they are made of -------------------------------------------------------------------------------


def _vision(path: Path) -> Path:
    model = randomize(ClipVisionModel(VISION))
    named = {f"vision_model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(named, path)
    return path


def _vace(place: Path) -> tuple[Path, Path]:
    """A model without and VACE's blocks alone, as Kijai has them."""
    tensors = {name: tensor.contiguous() for name, tensor in randomize(WanModel(VACE)).state_dict().items()}
    base, module = place / "base.safetensors", place / "Wan2_1-VACE_module_1_3B.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if not name.startswith("vace")}, base)
    save_file({name: tensor for name, tensor in tensors.items() if name.startswith("vace")}, module)
    return base, module


def _tiny_decoder(path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in randomize(TinyVAE(DECODER)).state_dict().items()}, path)
    return path


def _wan_gguf(path: Path) -> Path:
    tensors = {}
    for name, tensor in randomize(WanModel(WIDE_WAN)).state_dict().items():
        packed = tensor.ndim == 2 and name.endswith("weight") and tensor.shape[1] % 32 == 0
        tensors[name] = (quantize(tensor, "Q8_0"), "Q8_0") if packed else (tensor, "F32")
    return write_gguf(path, tensors, "wan")
