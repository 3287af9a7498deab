"""The Wan VAEs against diffusers' AutoencoderKLWan with the same weights, and their streaming, errors and files."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from lowvram_video.vae.files import to_channels_last
from lowvram_video.vae.strips import aligned
from lowvram_video.wanvideo.vae import coding
from lowvram_video.wanvideo.vae.blocks import RMSNorm
from lowvram_video.wanvideo.vae.checkpoint import WAN_FORMAT, to_official_names
from lowvram_video.wanvideo.vae.model import WAN21_VAE, WAN22_VAE, VAEConfig, WanVAE
from lowvram_video.wanvideo.vae.strip import Strip
from lowvram_video.weights.files.checkpoint import CheckpointError
from safetensors.torch import save_file
from torch import Tensor

CPU = torch.device("cpu")
open_vae = WAN_FORMAT.open_file

BOUND = 1e-4  # maximum error over the reference's maximum, in float32

TINY = {
    "2.1": replace(WAN21_VAE, encoder_dim=8, decoder_dim=8),
    # Unequal widths, as in the released Wan 2.2 VAE.
    "2.2": replace(WAN22_VAE, encoder_dim=8, decoder_dim=16),
}


def reference_vae(config: VAEConfig) -> AutoencoderKLWan:
    """diffusers' VAE of the same dimensions, with random weights and gammas."""
    torch.manual_seed(0)
    patch = config.patch_size
    vae = AutoencoderKLWan(
        base_dim=config.encoder_dim,
        decoder_base_dim=config.decoder_dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=list(config.temporal_downsample),
        is_residual=config.residual_shortcuts,
        patch_size=patch if patch > 1 else None,
        in_channels=config.encoded_channels * patch**2,
        out_channels=config.decoded_channels * patch**2,
        scale_factor_spatial=config.spatial_stride,
    ).eval()
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            parameter.data.uniform_(0.5, 1.5)
    return vae


def statistics(config: VAEConfig) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latent_mean, config.latent_std))
    return mean, std


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module", params=list(TINY))
def pair(request: pytest.FixtureRequest) -> tuple[WanVAE, AutoencoderKLWan]:
    config = TINY[request.param]
    reference = reference_vae(config)
    weights = reference.state_dict()
    names = to_official_names(weights)
    vae = WanVAE(config)
    vae.load_state_dict({names[name]: tensor for name, tensor in weights.items()}, strict=True)
    return vae, reference


def random_video(num_frames: int, height: int = 32, width: int = 64) -> Tensor:
    return torch.rand(2, 3, num_frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def random_latent(config: VAEConfig, num_frames: int, height: int = 2, width: int = 4) -> Tensor:
    return torch.randn(2, config.z_dim, num_frames, height, width, generator=torch.Generator().manual_seed(2))


# --- numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [1, 5, 17])
def test_encode_matches_diffusers(pair, num_frames):
    vae, reference = pair
    video = random_video(num_frames)
    mean, std = statistics(vae.config)
    with torch.no_grad():
        expected = (reference.encode(video).latent_dist.mode() - mean) / std
    error = relative_error(vae.encode(video), expected)
    print(f"{vae.config.name} encode, {num_frames} frames: max relative error {error:.2e}")
    assert error <= BOUND


@pytest.mark.parametrize("num_frames", [1, 5, 17])
def test_decode_matches_diffusers(pair, num_frames):
    vae, reference = pair
    latent = random_latent(vae.config, (num_frames - 1) // 4 + 1)
    mean, std = statistics(vae.config)
    with torch.no_grad():
        expected = reference.decode(latent * std + mean).sample
    video = torch.cat(list(vae.decode_pieces(latent)), dim=2).clamp(-1.0, 1.0)  # as diffusers does
    error = relative_error(video, expected)
    print(f"{vae.config.name} decode, {num_frames} frames: max relative error {error:.2e}")
    assert video.shape[2] == num_frames
    assert expected.abs().mean() < 0.9, "the comparison would only see clamped values"
    assert error <= BOUND


def test_latent_statistics_match_diffusers():
    defaults = AutoencoderKLWan(base_dim=4).config
    assert WAN21_VAE.latent_mean == tuple(defaults.latents_mean)
    assert WAN21_VAE.latent_std == tuple(defaults.latents_std)


@pytest.mark.parametrize("config", [WAN21_VAE, WAN22_VAE], ids=lambda config: config.name)
def test_latent_statistics_cover_every_channel(config):
    assert len(config.latent_mean) == len(config.latent_std) == config.z_dim
    assert min(config.latent_std) > 0


@pytest.mark.parametrize(
    ("config", "num_parameters", "num_tensors", "strides"),
    [(WAN21_VAE, 126_892_531, 194, (4, 8)), (WAN22_VAE, 704_688_668, 196, (4, 16))],
    ids=["2.1", "2.2"],
)
def test_released_sizes(config, num_parameters, num_tensors, strides):
    """Parameter counts of the released files (Wan2.1_VAE.pth and Wan2.2_VAE.pth)."""
    vae = WanVAE(config, device="meta")
    assert sum(parameter.numel() for parameter in vae.parameters()) == num_parameters
    assert len(vae.state_dict()) == num_tensors
    assert (config.temporal_stride, config.spatial_stride) == strides


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(pair, dtype):
    vae, _ = pair
    half = WanVAE(vae.config, dtype=dtype)
    half.load_state_dict(vae.state_dict())
    latent, video = random_latent(vae.config, 2), random_video(5)
    decoded = torch.cat(list(half.decode_pieces(latent)), dim=2)
    error = (decoded.float() - torch.cat(list(vae.decode_pieces(latent)), dim=2)).abs().mean().item()
    latent_error = (half.encode(video).float() - vae.encode(video)).abs().mean().item()
    print(f"{vae.config.name} {dtype}: mean error of frames {error:.1e}, of latents {latent_error:.1e}")
    assert decoded.dtype == dtype
    assert error < 0.02  # about a dozen rounded convolutions: 2**-8 each in bfloat16
    assert latent_error < 0.02


def test_norm_matches_its_formula():
    norm = RMSNorm(6).requires_grad_(False)
    norm.gamma.uniform_(0.5, 1.5)
    x = torch.randn(2, 6, 3, 4, 5)
    expected = torch.nn.functional.normalize(x, dim=1) * 6**0.5 * norm.gamma
    error = relative_error(norm(x), expected)
    print(f"RMS norm: max relative error {error:.2e}")
    assert error <= 1e-6
    assert torch.equal(norm(torch.zeros(1, 6, 1, 1, 1)), torch.zeros(1, 6, 1, 1, 1))


def test_layout_changes_nothing(pair):
    vae, _ = pair
    other = WanVAE(vae.config)
    other.load_state_dict(vae.state_dict())
    other.load_state_dict({name: to_channels_last(each) for name, each in vae.state_dict().items()}, assign=True)
    latent, video = random_latent(vae.config, 3), random_video(9)
    decoded = list(other.decode_pieces(latent))
    assert [frames.shape[2] for frames in decoded] == [1, 4, 4]
    error = relative_error(torch.cat(decoded, dim=2), torch.cat(list(vae.decode_pieces(latent)), dim=2))
    latent_error = relative_error(other.encode(video), vae.encode(video))
    print(f"{vae.config.name}: max relative errors {error:.2e}, {latent_error:.2e}")
    assert max(error, latent_error) <= BOUND


# --- streaming -------------------------------------------------------------------------------------------


def test_frames_arrive_one_then_four(pair):
    vae, _ = pair
    chunks = [frames.shape for frames in vae.decode_pieces(random_latent(vae.config, 3))]
    stride = vae.config.spatial_stride
    assert [tuple(shape) for shape in chunks] == [(2, 3, t, 2 * stride, 4 * stride) for t in (1, 4, 4)]


def test_the_first_frames_need_no_later_latent(pair):
    vae, _ = pair
    latent = random_latent(vae.config, 4)
    whole = vae.decode_pieces(latent)
    for prefix_frames in vae.decode_pieces(latent[:, :, :2]):
        assert torch.equal(prefix_frames, next(whole))


def test_two_decodes_at_once_do_not_disturb_each_other(pair):
    vae, _ = pair
    first, second = random_latent(vae.config, 3), random_latent(vae.config, 3).flip(1)
    expected = [list(vae.decode_pieces(first)), list(vae.decode_pieces(second))]
    woven = list(zip(vae.decode_pieces(first), vae.decode_pieces(second), strict=True))
    for step, (a, b) in enumerate(woven):
        assert torch.equal(a, expected[0][step])
        assert torch.equal(b, expected[1][step])


def watch_strips(monkeypatch: pytest.MonkeyPatch) -> list[Strip]:
    """The strips that passes begin, as they begin them."""
    begun: list[Strip] = []

    class Watched(Strip):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            begun.append(self)

    monkeypatch.setattr(coding, "Strip", Watched)
    return begun


def test_an_abandoned_decode_frees_its_memory(pair, monkeypatch):
    vae, _ = pair
    begun = watch_strips(monkeypatch)
    frames = vae.decode_pieces(random_latent(vae.config, 4))
    next(frames)
    strips = [weakref.ref(strip) for strip in begun]
    begun.clear()
    assert len(strips) == 2 and all(strip() is not None for strip in strips)
    frames.close()
    gc.collect()
    assert all(strip() is None for strip in strips)


def test_three_frames_are_held_per_convolution(pair, monkeypatch):
    """The one that is convolved and two before it; no more, however long the video."""
    vae, _ = pair
    begun = watch_strips(monkeypatch)
    pieces = vae.decode_pieces(random_latent(vae.config, 3))
    next(pieces)
    next(pieces)
    for strip in begun:
        assert strip._running
        for conv, ring in strip._running.items():
            assert ring._frames.shape[1] == 3 * conv.in_channels
        held = [ring._frames for ring in strip._running.values()]  # side by side
        assert len({frames.untyped_storage().data_ptr() for frames in held}) == 1
        places = sum(aligned(frames.numel()) * frames.element_size() for frames in held)
        assert held[0].untyped_storage().nbytes() == places


def test_decode_leaves_the_callers_grad_mode_alone(pair):
    vae, _ = pair
    frames = vae.decode_pieces(random_latent(vae.config, 2))
    next(frames)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_upsampling_holds_one_enlarged_frame_at_a_time(pair, monkeypatch):
    """Frames go all the way through one by one: none is enlarged beside another."""
    vae, _ = pair
    seen: list[tuple[int, ...]] = []
    real = Strip.new_frame

    def new_frame(strip: Strip, *given: Any) -> Tensor:
        frame = real(strip, *given)
        seen.append(tuple(frame.shape))
        return frame

    monkeypatch.setattr(Strip, "new_frame", new_frame)
    list(vae.decode_pieces(random_latent(vae.config, 2)))
    # three resolutions, of 1, then 2, 4 and 4 frames
    assert len(seen) == 3 + 10 and all(len(shape) == 4 for shape in seen)


# --- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((1, 3, 6, 32, 32), ("6 frames", "4n+1", "5 or 9")),
        ((1, 3, 0, 32, 32), ("0 frames", "1 or 5")),
        ((1, 3, 5, 30, 32), ("32x30", "divide by 8", "32x32")),
        ((1, 4, 5, 32, 32), ("[1, 4, 5, 32, 32]", "alpha")),
        ((3, 5, 32, 32), ("[3, 5, 32, 32]",)),
    ],
)
def test_a_video_that_does_not_fit_is_refused_with_the_fix(shape, parts):
    vae = WanVAE(WAN21_VAE, device="meta")
    with pytest.raises(ValueError, match=r"Wan 2\.1 VAE") as error:
        vae.encode(torch.zeros(shape))
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("config", "channels", "parts"),
    [
        (WAN22_VAE, 16, ("16 channels", "Wan 2.2 VAE decodes 48", "wan_2.1_vae.safetensors", "Wan 2.2 A14B")),
        (WAN21_VAE, 48, ("48 channels", "Wan 2.1 VAE decodes 16", "wan2.2_vae.safetensors", "TI2V 5B")),
        (WAN21_VAE, 4, ("4 channels", "decodes 16", "Wan model")),
    ],
)
def test_a_latent_of_another_vae_is_refused_at_the_call(config, channels, parts):
    vae = WanVAE(config, device="meta")
    with pytest.raises(ValueError, match="channels") as error:
        vae.decode_pieces(torch.zeros(1, channels, 1, 4, 4))
    for part in parts:
        assert part in str(error.value)


def test_an_image_latent_is_refused():
    with pytest.raises(ValueError, match="video of one frame"):
        WanVAE(WAN21_VAE, device="meta").decode_pieces(torch.zeros(1, 16, 4, 4))


# --- files -----------------------------------------------------------------------------------------------


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_a_file_loads_as_it_was_saved(pair, prefix, tmp_path):
    vae, _ = pair
    tensors = {prefix + name: tensor for name, tensor in vae.state_dict().items()}
    if prefix:
        tensors["model.diffusion_model.head.weight"] = torch.zeros(2)
    path = saved(tmp_path / "vae.safetensors", tensors)
    assert open_vae(path).config == vae.config
    loaded = open_vae(path).build(torch.float32, CPU)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    latent = random_latent(vae.config, 2)
    for a, b in zip(loaded.decode_pieces(latent), vae.decode_pieces(latent), strict=True):
        assert torch.equal(a, b)


def test_each_half_works_without_the_other(pair, tmp_path):
    vae, _ = pair
    opened = open_vae(saved(tmp_path / "vae.safetensors", dict(vae.state_dict())))
    encoder, decoder = (opened.build(torch.float32, CPU, half) for half in ("encoder", "decoder"))
    latent, video = random_latent(vae.config, 2), random_video(5)
    assert torch.equal(encoder.encode(video), vae.encode(video))
    assert torch.equal(torch.cat(list(decoder.decode_pieces(latent)), 2), torch.cat(list(vae.decode_pieces(latent)), 2))
    for half, built in (("encoder", encoder), ("decoder", decoder)):
        read = sum(each.nbytes for each in built.parameters() if not each.is_meta)
        assert opened.weight_bytes(torch.float32, half) == read < opened.weight_bytes(torch.float32)


def test_a_diffusers_file_loads(pair, tmp_path):
    vae, reference = pair
    path = saved(tmp_path / "diffusion_pytorch_model.safetensors", reference.state_dict())
    loaded = open_vae(path).build(torch.bfloat16, CPU)
    assert loaded.config == vae.config
    for name, tensor in vae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(torch.bfloat16))


def test_official_names_match_diffusers_own_conversion():
    convert = pytest.importorskip("diffusers.loaders.single_file_utils").convert_wan_vae_to_diffusers
    official = WanVAE(WAN21_VAE, device="meta").state_dict()
    # Values that say which tensor they were, so that the two directions meet.
    theirs = convert({name: name for name in official})
    ours = to_official_names(theirs)
    assert ours == theirs
    assert set(AutoencoderKLWan(base_dim=4).state_dict()) == set(theirs)


def test_official_names_stay(pair):
    vae, _ = pair
    assert all(old == new for old, new in to_official_names(vae.state_dict()).items())


def test_dimensions_come_from_shapes(tmp_path):
    config = replace(
        WAN21_VAE, encoder_dim=4, decoder_dim=2, dim_mult=(1, 2, 4), num_res_blocks=1, temporal_downsample=(True, True)
    )
    path = saved(tmp_path / "odd.safetensors", WanVAE(config).state_dict())
    assert open_vae(path).config == config


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["blocks.0.cross_attn.norm_q.weight", "patch_embedding.weight"], "Wan transformer"),
        (["decoder.conv_in.weight", "decoder.conv_out.weight", "encoder.conv_in.weight"], "image VAE"),
        (["x.lora_down.weight"], "LoRA"),
    ],
)
def test_another_file_is_named(names, what, tmp_path):
    path = saved(tmp_path / "other.safetensors", {name: torch.zeros(1) for name in names})
    with pytest.raises(CheckpointError, match="expected a Wan VAE") as error:
        open_vae(path)
    for part in (str(path), what, "wan_2.1_vae.safetensors"):
        assert part in str(error.value)


def test_a_file_without_its_encoder_is_refused(pair, tmp_path):
    vae, _ = pair
    tensors = {name: t for name, t in vae.state_dict().items() if not name.startswith("encoder.")}
    path = saved(tmp_path / "decoder.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"encoder\.conv1\.weight.*nothing"):
        open_vae(path)


def test_a_missing_or_misshapen_tensor_is_named(pair, tmp_path):
    vae, _ = pair
    tensors = dict(vae.state_dict())
    tensors["decoder.head.0.gamma"] = tensors["decoder.head.0.gamma"][:3]
    path = saved(tmp_path / "short.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"decoder\.head\.0\.gamma .* is \[3, 1, 1, 1\]; expected"):
        open_vae(path).build(torch.float32, CPU)
    del tensors["decoder.head.0.gamma"]
    with pytest.raises(CheckpointError, match=r"decoder\.head\.0\.gamma .* is nothing"):
        open_vae(saved(tmp_path / "less.safetensors", tensors))


def test_a_vae_of_unknown_latents_is_refused(tmp_path):
    config = replace(TINY["2.1"], z_dim=8)
    path = saved(tmp_path / "eight.safetensors", WanVAE(config).state_dict())
    with pytest.raises(CheckpointError, match="8 latent channels; expected 16"):
        open_vae(path)
