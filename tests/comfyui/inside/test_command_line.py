"""The command line's pictures, control videos and references: the latents that the nodes make of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.clip_vision
import comfy_extras.nodes_wan as nodes_wan
import pytest
import torch
from lowvram_pack.runtime.settings import RunSettings
from lowvram_pack.video.reader import read_video
from lowvram_pack.video.writer import VideoWriter
from lowvram_pack.wanvideo import matching
from lowvram_pack.wanvideo.identity import WanFiles
from lowvram_pack.wanvideo.pipeline import WanPipeline
from lowvram_pack.wanvideo.request import WanRequest
from lowvram_pack.wanvideo.vae.model import WAN21_VAE
from PIL import Image
from safetensors.torch import save_file
from test_nodes import tiny_vae
from tiny_models import ours, prompts, relative_error, sample, save
from torch import Tensor

WIDTH, HEIGHT, FRAMES, FPS = 96, 64, 9, 16
SIZE = {"width": WIDTH, "height": HEIGHT, "length": FRAMES, "batch_size": 1}
SETTINGS = {"seed": 5, "steps": 3, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple"}
SHIFT = 8.0  # core's for Wan
CLIP = {
    "hidden_size": 1280, "intermediate_size": 64, "num_attention_heads": 16, "num_hidden_layers": 3,
    "hidden_act": "gelu", "num_channels": 3, "image_size": 28, "patch_size": 14, "projection_dim": 16,
    "model_type": "clip_vision_model",
}  # fmt: skip
BOUND = 1e-4


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pictures of the video's size, and a control video."""
    folder = tmp_path_factory.mktemp("shown")
    generator = torch.Generator().manual_seed(11)
    paths = {}
    for name in ("image", "end_image", "reference"):
        pixels = torch.randint(0, 256, (HEIGHT, WIDTH, 3), dtype=torch.uint8, generator=generator)
        paths[name] = folder / f"{name}.png"
        Image.fromarray(pixels.numpy()).save(paths[name])
    paths["control"] = folder / "control.mp4"
    with VideoWriter(paths["control"], FPS) as writer:
        writer.write(torch.randint(0, 256, (FRAMES, HEIGHT, WIDTH, 3), dtype=torch.uint8, generator=generator))
    return paths


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tiny CLIP vision model as core has it, and its file."""
    folder = tmp_path_factory.mktemp("clip")
    described = folder / "config.json"  # 0.8 takes no dict
    described.write_text(json.dumps(CLIP))
    model = comfy.clip_vision.ClipVisionModel(str(described))
    generator = torch.Generator().manual_seed(12)
    weights = {}
    for name, tensor in model.model.state_dict().items():
        values = torch.randn(tensor.shape, generator=generator)
        scale = 0.7 / tensor[0].numel() ** 0.5 if tensor.ndim > 1 else 0.1
        weights[name] = (values * scale + float("norm" in name and name.endswith("weight"))).half()
    model.load_sd(weights)
    path = folder / "clip_vision_h.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    return model, path


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tiny Wan VAE as core has it, and its file."""
    model = tiny_vae("2.1")
    path = tmp_path_factory.mktemp("vae") / "wan_2.1_vae.safetensors"
    save_file(
        {name: tensor.float().contiguous() for name, tensor in model.first_stage_model.state_dict().items()}, path
    )
    return model, path


def image(path: Path) -> Tensor:
    """An IMAGE `[T, H, W, 3]`."""
    if path.suffix == ".mp4":
        return read_video(path, WIDTH, HEIGHT, FPS).float() / 255
    return torch.frombuffer(bytearray(Image.open(path).tobytes()), dtype=torch.uint8).view(1, HEIGHT, WIDTH, 3) / 255


def by_command_line(
    files: WanFiles,
    given: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    strength: float | None = None,
    batched: bool = False,
) -> Tensor:
    """The latent that is decoded, in the network's scale."""
    positive, negative = prompts()
    text = torch.cat([positive[0][0], negative[0][0]])
    encoder = SimpleNamespace(tokenizer=lambda _: None, config=SimpleNamespace(dim=4096))
    monkeypatch.setattr(matching, "open_text_encoder", lambda _: encoder)
    monkeypatch.setattr(WanPipeline, "_encode_text", lambda self, texts: text)
    made: list[Tensor] = []
    monkeypatch.setattr(WanPipeline, "_decode", lambda self, latent, plan: made.append(latent) or iter(()))
    pipeline = WanPipeline(files, RunSettings(attention_mode="sdpa", batched_guidance=batched))
    request = WanRequest(
        "a red ball", width=WIDTH, height=HEIGHT, num_frames=FRAMES, seed=5, num_steps=3, sampler="euler",
        spacing="simple", shift=SHIFT, guidance=3.0, control_strength=strength, **given,
    )  # fmt: skip
    list(pipeline.generate(request))
    return made[0]


def by_nodes(path: Path, conditions: tuple[Any, ...]) -> Tensor:
    """What core's KSampler makes with our MODEL, in the network's scale."""
    positive, negative, latent, *trimmed = conditions
    samples = sample(ours(path), positive, negative, latent, **SETTINGS)[:, :, trimmed[0] if trimmed else 0 :]
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (WAN21_VAE.latent_mean, WAN21_VAE.latent_std))
    return (samples - mean) / std


def check(ours: Tensor, theirs: Tensor, what: str) -> None:
    error = relative_error(ours, theirs)
    print(f"{what}: relative error {error:.2e}")
    assert ours.shape == theirs.shape and error < BOUND


@pytest.mark.newest
@pytest.mark.parametrize("given", [("image",), ("image", "end_image")])
def test_pictures_with_clips_features(
    models: Path,
    shown: dict[str, Path],
    clip: tuple[Any, Path],
    vae: tuple[Any, Path],
    monkeypatch: pytest.MonkeyPatch,
    given: tuple[str, ...],
) -> None:
    variant = "i2v" if given == ("image",) else "flf2v"
    path, pictures = save(models, variant), {name: shown[name] for name in given}
    positive, negative = prompts()
    seen = [clip[0].encode_image(image(picture), crop=False) for picture in pictures.values()]
    if variant == "i2v":
        conditions = nodes_wan.WanImageToVideo.execute(
            positive, negative, vae[0], **SIZE, start_image=image(shown["image"]), clip_vision_output=seen[0]
        )
    else:
        conditions = nodes_wan.WanFirstLastFrameToVideo.execute(
            positive, negative, vae[0], **SIZE, start_image=image(shown["image"]), end_image=image(shown["end_image"]),
            clip_vision_start_image=seen[0], clip_vision_end_image=seen[1],
        )  # fmt: skip
    wanted = by_nodes(path, conditions.result)
    files = WanFiles(path, Path("umt5.safetensors"), vae[1], clip_vision=clip[1])
    check(by_command_line(files, pictures, monkeypatch), wanted, variant)


@pytest.mark.newest
@pytest.mark.parametrize("given", [("control",), ("control", "reference"), ("image", "end_image")])
def test_vace(
    models: Path,
    shown: dict[str, Path],
    vae: tuple[Any, Path],
    monkeypatch: pytest.MonkeyPatch,
    given: tuple[str, ...],
) -> None:
    path, pictures = save(models, "vace"), {name: shown[name] for name in given}
    video, masks = torch.full((FRAMES, HEIGHT, WIDTH, 3), 0.5), torch.ones(FRAMES, HEIGHT, WIDTH)
    if "control" in given:
        video = image(shown["control"])
    if "image" in given:  # given frames stay
        video[0], video[-1] = image(shown["image"])[0], image(shown["end_image"])[0]
        masks[0] = masks[-1] = 0
    reference = image(shown["reference"]) if "reference" in given else None
    conditions = nodes_wan.WanVaceToVideo.execute(
        *prompts(), vae[0], **SIZE, strength=0.7, control_video=video, control_masks=masks, reference_image=reference
    )
    wanted = by_nodes(path, conditions.result)
    files = WanFiles(path, Path("umt5.safetensors"), vae[1])
    for batched in (False, True):
        check(by_command_line(files, pictures, monkeypatch, 0.7, batched), wanted, f"vace, {given}, batched {batched}")


@pytest.mark.newest
@pytest.mark.parametrize("given", [("control",), ("control", "reference", "image")])
def test_fun_control(
    models: Path,
    shown: dict[str, Path],
    vae: tuple[Any, Path],
    monkeypatch: pytest.MonkeyPatch,
    given: tuple[str, ...],
) -> None:
    path, pictures = save(models, "fun control"), {name: shown[name] for name in given}
    images = {name: image(picture) for name, picture in pictures.items()}
    conditions = nodes_wan.Wan22FunControlToVideo.execute(
        *prompts(), vae[0], **SIZE, ref_image=images.get("reference"), start_image=images.get("image"),
        control_video=images["control"],
    )  # fmt: skip
    wanted = by_nodes(path, conditions.result)
    files = WanFiles(path, Path("umt5.safetensors"), vae[1])
    check(by_command_line(files, pictures, monkeypatch), wanted, f"fun control, {given}")


@pytest.mark.newest
def test_fun_control_with_clips_features(
    models: Path, shown: dict[str, Path], clip: tuple[Any, Path], vae: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, pictures = save(models, "fun control 2.1"), {name: shown[name] for name in ("control", "image")}
    conditions = nodes_wan.WanFunControlToVideo.execute(
        *prompts(), vae[0], **SIZE, start_image=image(shown["image"]), control_video=image(shown["control"]),
        clip_vision_output=clip[0].encode_image(image(shown["image"]), crop=False),
    )  # fmt: skip
    wanted = by_nodes(path, conditions.result)
    files = WanFiles(path, Path("umt5.safetensors"), vae[1], clip_vision=clip[1])
    check(by_command_line(files, pictures, monkeypatch), wanted, "fun control 2.1")
