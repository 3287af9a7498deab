"""Tiny decoders of latents: their files, and frame by frame the same as all frames at once."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lowvram_video.vae.tiling import Tile, decode_in
from lowvram_video.vae.tiny import TINY_16, TINY_48, Growth, Remembering, TinyConfig, TinyVAE
from lowvram_video.vae.tiny_files import TINY_FORMAT, takes_raw_latents
from lowvram_video.weights.files.checkpoint import CheckpointError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

CONFIGS = {name: replace(known, widths=(16, 12, 8, 8)) for name, known in (("16", TINY_16), ("48", TINY_48))}


def tiny(config: TinyConfig) -> TinyVAE:
    torch.manual_seed(0)
    vae = TinyVAE(config)
    for parameter in vae.parameters():
        nn.init.normal_(parameter, std=(0.8 / parameter[0].numel() ** 0.5) if parameter.ndim > 1 else 0.1)
    nn.init.constant_(vae.decoder[22].bias, 0.5)  # grey
    return vae


def at_once(vae: TinyVAE, latent: Tensor) -> Tensor:
    """All frames through one layer after the other, as the paper trains it: `[1, 3, T, H, W]` in about -1 ... 1."""
    x = latent[0].transpose(0, 1)
    for layer in vae.decoder:
        if isinstance(layer, Remembering):
            past = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
            x = F.relu(layer.conv(torch.cat([x, past], dim=1)) + x)
        elif isinstance(layer, Growth):
            frames, channels = x.shape[:2]
            x = F.conv2d(x, layer.conv.weight).reshape(frames * layer.num_frames, channels, *x.shape[2:])
        else:
            x = layer(x)
    pixels = F.pixel_shuffle(x, vae.config.patch_size)[3:]
    return pixels.mul(2).sub(1).transpose(0, 1)[None]


def decoded(vae: TinyVAE, latent: Tensor, tile: Tile | None = None) -> Tensor:
    return torch.cat(list(decode_in(vae, latent, tile or Tile())), dim=2)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("num_latents", [1, 2, 5])
def test_frame_by_frame_is_all_at_once(name: str, num_latents: int) -> None:
    vae = tiny(CONFIGS[name])
    latent = 2 * torch.randn(1, vae.config.latent_channels, num_latents, 6, 4)
    want = at_once(vae, latent)
    pieces = list(vae.decode_pieces(latent))
    assert [piece.shape[2] for piece in pieces] == [1, *[4] * (num_latents - 1)]
    assert pieces[0].shape[3:] == tuple(side * vae.config.spatial_stride for side in (6, 4))
    assert want.std() > 0.02
    assert float((torch.cat(pieces, dim=2) - want).abs().max()) < 1e-5


def test_videos_of_a_batch_do_not_mix() -> None:
    vae = tiny(CONFIGS["16"])
    latent = torch.randn(2, 16, 3, 4, 4)
    both = decoded(vae, latent)
    for index in range(2):
        assert torch.allclose(both[index : index + 1], decoded(vae, latent[index : index + 1]), atol=1e-5)


def test_tiles_are_close_to_whole_frames() -> None:
    vae = tiny(CONFIGS["16"])
    latent = torch.randn(1, 16, 2, 24, 24)
    whole, tiled = decoded(vae, latent), decoded(vae, latent, Tile(128))
    assert float((tiled - whole).norm() / whole.norm()) < 0.05


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_says_what_it_holds(name: str, tmp_path: Path) -> None:
    vae = tiny(CONFIGS[name])
    path = tmp_path / "taew.safetensors"
    encoder = {"encoder.0.weight": torch.zeros(4, 3, 3, 3)}  # of no use here
    save_file({key: value.contiguous() for key, value in vae.state_dict().items()} | encoder, path)
    opened = TINY_FORMAT.open_file(path)
    assert opened.config == vae.config
    built = opened.build(torch.float32, torch.device("cpu"), only="decoder")
    latent = torch.randn(1, vae.config.latent_channels, 2, 4, 4)
    assert torch.equal(decoded(built, latent), decoded(vae, latent))


@pytest.mark.parametrize(
    ("name", "dtype", "raw"),
    [
        ("taew2_1.safetensors", torch.bfloat16, False),
        ("lighttaew2_1.safetensors", torch.float16, True),
        ("decoder.safetensors", torch.float16, False),
        ("decoder.safetensors", torch.bfloat16, True),
    ],
)
def test_the_scale_of_latents_is_told_by_name_or_numbers(
    tmp_path: Path, name: str, dtype: torch.dtype, raw: bool
) -> None:
    vae = tiny(CONFIGS["16"])
    save_file({key: value.to(dtype).contiguous() for key, value in vae.state_dict().items()}, tmp_path / name)
    assert takes_raw_latents(TINY_FORMAT.open_file(tmp_path / name)) is raw


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"decoder.1.weight": torch.zeros(16, 128, 3, 3)}, r"a tiny decoder of 128 latent channels to 3 of a pixel"),
        ({"decoder.22.weight": torch.zeros(12, 8, 3, 3)}, r"16 latent channels to 12 of a pixel, of another model"),
        ({"decoder.7.conv.weight": torch.zeros(32, 16, 1, 1)}, "makes 8 frames of one; expected 4"),
        ({"decoder.14.weight": None}, r"without a convolution decoder\.14\.weight"),
        ({"decoder.4.conv.2.weight": torch.zeros(3, 16, 3, 3)}, r"decoder\.4\.conv\.2\.weight .* is \[3, 16, 3, 3\]"),
        ({"decoder.22.bias": None}, "expected a tiny decoder"),
    ],
)
def test_files_that_are_none(tmp_path: Path, changes: dict[str, Tensor | None], said: str) -> None:
    tensors = {key: value.contiguous() for key, value in tiny(CONFIGS["16"]).state_dict().items()} | changes
    path = tmp_path / "a.safetensors"
    save_file({key: value for key, value in tensors.items() if value is not None}, path)
    with pytest.raises(CheckpointError, match=said):
        TINY_FORMAT.open_file(path)


def test_pickles_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "taew2_1.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match=r"pickle.*download the"):
        TINY_FORMAT.open_file(tmp_path / "taew2_1.pth")


def test_what_it_cannot_do_is_said() -> None:
    vae = tiny(CONFIGS["16"])
    with pytest.raises(ValueError, match=r"latents of Wan 2\.2 TI2V 5B models need taew2_2|Latents of Wan 2\.2 TI2V"):
        vae.decode_pieces(torch.zeros(1, 48, 1, 4, 4))
    with pytest.raises(ValueError, match="only decodes, for drafts"):
        vae.encode(torch.zeros(1, 3, 1, 32, 32))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_memory_that_it_is_planned_with_suffices(name: str) -> None:
    """By the sizes of what a layer reads and makes beside what is remembered, at the largest picture."""
    vae = tiny(replace(CONFIGS[name], widths=(64, 32, 16, 16)))
    peak = 0

    def count(layer: nn.Module, given: tuple[Tensor, ...], made: Tensor | tuple[Tensor, ...]) -> None:
        nonlocal peak
        inside = 4 if isinstance(layer, Remembering) else 1  # both frames in one tensor, and a result or two
        results = made if isinstance(made, tuple) else (made,)
        peak = max(peak, remembered() + sum(map(size, given)) + inside * sum(map(size, results)))

    def size(tensor: Tensor) -> int:
        return tensor.numel() * tensor.element_size()

    def remembered() -> int:
        return sum(inputs.values())

    inputs: dict[int, int] = {}
    for index, layer in enumerate(vae.decoder):
        layer.register_forward_hook(count)
        if isinstance(layer, Remembering):
            layer.register_forward_hook(lambda _, given, __, index=index: inputs.update({index: size(given[0])}))
    for _ in vae.decode_pieces(torch.randn(1, vae.config.latent_channels, 3, 8, 8)):
        pass
    side = 8 * vae.config.spatial_stride
    planned = vae.config.decode_bytes(side, side, 4)
    print(f"{name} channels: {peak / 2**20:.2f} MiB at a time, {planned / 2**20:.2f} planned")
    assert 0 < peak <= planned <= 4 * peak
