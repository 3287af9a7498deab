"""CLIP's vision model for Wan 2.1's image-to-video models: transformers' tokens, its files, what a request wants."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.wanvideo.clip_vision import MEAN, STD, ClipVisionEncoder, open_clip_vision
from lowvram_video.wanvideo.given import check_pictures
from lowvram_video.wanvideo.identity import WanFiles
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.pipeline import WanPipeline
from lowvram_video.wanvideo.request import WanRequest
from lowvram_video.weights.files.checkpoint import CheckpointError
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from .tiny import save_files, save_vae

CPU = torch.device("cpu")
LAYERS = 3


@pytest.fixture(scope="module")
def reference() -> CLIPVisionModelWithProjection:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=1280, intermediate_size=96, num_attention_heads=16, num_hidden_layers=LAYERS, image_size=28,
        patch_size=14, projection_dim=8, hidden_act="gelu",
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config).eval()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, reference: CLIPVisionModelWithProjection) -> Path:
    file = tmp_path_factory.mktemp("clip") / "clip_vision_h.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in reference.state_dict().items()}, file)
    return file


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def test_tokens_are_transformers_before_the_last_layer(path: Path, reference: CLIPVisionModelWithProjection) -> None:
    picture = torch.rand(2, 3, 28, 28).mul(255).round() / 127.5 - 1
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    with torch.inference_mode():
        seen = reference(((picture + 1) / 2 - mean) / std, output_hidden_states=True).hidden_states[-2]
    encoder = ClipVisionEncoder(path, CPU, torch.float32)
    tokens = encoder.encode(picture)
    error = relative_error(tokens, seen)
    print(f"CLIP vision, hidden states before the last layer: relative error {error:.2e}")
    assert tokens.shape == (2, 5, 1280) and error < 1e-5
    assert (encoder.config.num_heads, encoder.config.num_layers) == (16, LAYERS - 1)
    # bf16 is that of the weights
    half = ClipVisionEncoder(path, CPU, torch.bfloat16).encode(picture)
    assert relative_error(half, seen) < 3e-2


def test_a_prefix_changes_nothing_and_what_is_not_read_may_lack(path: Path, tmp_path: Path) -> None:
    tensors = load_file(path)
    other = {
        f"clip_vision.{name}": tensor
        for name, tensor in tensors.items()
        if "post_layernorm" not in name and "visual_projection" not in name
    }
    save_file(other | {"other.weight": torch.zeros(2)}, tmp_path / "prefixed.safetensors")
    picture = torch.rand(1, 3, 40, 60) * 2 - 1
    first, second = (
        ClipVisionEncoder(file, CPU, torch.float32).encode(picture)
        for file in (path, tmp_path / "prefixed.safetensors")
    )
    assert torch.equal(first, second)


def test_other_files_are_named(path: Path, tmp_path: Path) -> None:
    tensors = load_file(path)
    save_file({"visual.transformer.resblocks.0.ln_1.weight": torch.zeros(2)}, tmp_path / "open.safetensors")
    with pytest.raises(CheckpointError, match=r"CLIP vision model in another layout.*choose clip_vision_h.safetensors"):
        open_clip_vision(tmp_path / "open.safetensors")
    with pytest.raises(CheckpointError, match=r"this is a Wan VAE; expected a CLIP vision model"):
        open_clip_vision(save_vae(tmp_path / "vae.safetensors"))
    del tensors["vision_model.encoder.layers.1.mlp.fc2.weight"]
    save_file(tensors, tmp_path / "cut.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks .*fc2.weight"):
        ClipVisionEncoder(tmp_path / "cut.safetensors", CPU, torch.float32)


# --- requests --------------------------------------------------------------------------------------------


def test_both_passes_in_one_batch_see_the_same_picture(path: Path, tmp_path: Path) -> None:
    files = replace(save_files(tmp_path, "i2v clip"), clip_vision=path)
    Image.effect_noise((48, 32), 60).convert("RGB").save(tmp_path / "first.png")
    request = WanRequest(
        "a red ball", width=48, height=32, num_frames=5, num_steps=2, image=tmp_path / "first.png", guidance=3.0
    )
    videos = [
        torch.cat(list(WanPipeline(files, RunSettings(batched_guidance=batched)).generate(request)))
        for batched in (False, True)
    ]
    assert (videos[0].int() - videos[1].int()).abs().max() <= 1


def test_a_clip_vision_model_that_the_model_does_not_read(path: Path, tmp_path: Path) -> None:
    files = replace(save_files(tmp_path), clip_vision=path)
    with pytest.raises(
        CheckpointError, match=r"width 1280 but wan_t2v.safetensors reads no CLIP features: leave it out"
    ):
        WanPipeline(files)


FILES = WanFiles(Path("wan.safetensors"), Path("umt5"), Path("vae"))
VACE = WanConfig("vace", vace_layers=2, vace_channels=96)
CONTROL = WanConfig("control", in_channels=52)
CLIP = WanConfig("i2v", in_channels=36, image_dim=1280)


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (WanConfig(), {"control": Path("a.mp4")}, "takes no control video: leave out --control, or choose a VACE"),
        (WanConfig(), {"reference": Path("a.png")}, "takes no reference picture: leave out --reference"),
        (CLIP, {"control": Path("a.mp4"), "image": Path("a.png")}, "takes no control video"),
        (CONTROL, {"reference": Path("a.png")}, "takes no reference picture"),
        (CONTROL, {}, "is steered by a control video: give --control"),
        (CONTROL, {"control": Path("a.mp4"), "end_image": Path("b.png")}, "a first frame only: leave out b.png"),
        (CONTROL, {"control": Path("a.mp4"), "control_strength": 0.5}, "leave out --control-strength"),
        (CLIP, {"image": Path("a.png")}, "give --clip-vision, which is clip_vision_h.safetensors"),
        (CLIP, {}, "makes a video of a picture: give --image"),
    ],
)
def test_what_a_model_takes(config: WanConfig, given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_pictures(WanRequest("a red ball", **given), config, FILES)


@pytest.mark.parametrize(
    ("config", "given"),
    [
        (VACE, {}),
        (VACE, {"control": Path("a.mp4"), "reference": Path("a.png"), "control_strength": 0.5}),
        (VACE, {"image": Path("a.png"), "end_image": Path("b.png")}),
        (CONTROL, {"control": Path("a.mp4"), "image": Path("a.png")}),
        (replace(CONTROL, reference_channels=16), {"reference": Path("a.png")}),
        (WanConfig("control", in_channels=100, out_channels=48), {"image": Path("a.png"), "end_image": Path("b.png")}),
    ],
)
def test_what_a_model_may_be_given(config: WanConfig, given: dict) -> None:
    check_pictures(WanRequest("a red ball", **given), config, FILES)
