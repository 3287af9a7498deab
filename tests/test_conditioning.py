"""Pictures as conditions: cropping, the I2V mask, and files that are no pictures."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lowvram_video.video.pictures import load_image
from lowvram_video.wanvideo.conditioning import image_channels
from lowvram_video.wanvideo.vae.model import WAN21_VAE, WanVAE
from PIL import Image
from torch import Tensor

from .tiny import randomize


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    vae = WanVAE(replace(WAN21_VAE, encoder_dim=8, decoder_dim=8))
    randomize(vae)
    return vae


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 255, (height, width, 3), dtype=np.uint8)


def original_mask(num_frames: int, height: int, width: int, given: list[int]) -> Tensor:
    """As Wan's own code makes it: frames, the first four times over, in groups of four that become channels."""
    frames = torch.zeros(1, num_frames, height, width)
    frames[:, given] = 1
    frames = torch.cat([frames[:, :1]] * 4 + [frames[:, 1:]], dim=1)
    return frames.view(1, frames.shape[1] // 4, 4, height, width).transpose(1, 2)  # [1, 4, T, h, w]


# --- channels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [[0], [-1], [0, -1]], ids=["first", "last", "both"])
@pytest.mark.parametrize("num_frames", [5, 13])
def test_mask_and_latents_of_the_given_frames(vae: WanVAE, given: list[int], num_frames: int) -> None:
    pictures = {at: torch.randn(1, 3, 1, 16, 24, generator=torch.Generator().manual_seed(at + 7)) for at in given}
    video = torch.zeros(1, 3, num_frames, 16, 24)
    for at, one in pictures.items():
        video[:, :, at] = one[:, :, 0]
    with torch.inference_mode():
        channels = image_channels(vae, pictures.get(0), pictures.get(-1), num_frames)
        expected = vae.encode(video)
    assert channels.shape == (1, 20, (num_frames - 1) // 4 + 1, 2, 3)
    assert torch.equal(channels[:, :4], original_mask(num_frames, 2, 3, given))
    error = float((channels[:, 4:] - expected).abs().max() / expected.abs().max())
    print(f"latents of the grey video: max relative error {error:.2e}")
    assert error <= 1e-6


def test_the_last_frame_is_one_channel_of_the_last_latent_frame(vae: WanVAE) -> None:
    with torch.inference_mode():
        mask = image_channels(vae, None, torch.zeros(1, 3, 1, 16, 24), 9)[0, :4, :, 0, 0]
    assert mask.tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1]]


def test_channels_want_a_picture(vae: WanVAE) -> None:
    with pytest.raises(ValueError, match="image-to-video needs a picture: give --image"):
        image_channels(vae, None, None, 5)


# --- pictures --------------------------------------------------------------------------------------------


def test_grey_of_16_bits_and_transparent_pictures(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 48 * 32).astype(np.uint16).reshape(32, 48)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    pixels = load_image(tmp_path / "grey.png", 48, 32)[0, :, 0]
    assert torch.equal(pixels[0], pixels[2]) and pixels.min() == -1 and pixels.max() == 1
    assert (pixels[0] - torch.from_numpy(grey / 32767.5 - 1)).abs().max() < 0.006
    hidden = np.zeros((32, 48, 4), dtype=np.uint8)
    hidden[..., 0], hidden[:, :24, 3] = 200, 255
    Image.fromarray(hidden).save(tmp_path / "clear.png")
    pixels = load_image(tmp_path / "clear.png", 48, 32)[0, :, 0]
    assert pixels[:, :, 24:].eq(1).all(), "white where nothing is"
    assert torch.allclose(pixels[:, 0, 0], torch.tensor([200 / 127.5 - 1, -1, -1]))


def test_a_picture_of_the_right_size_is_taken_as_it_is(tmp_path: Path) -> None:
    array = picture(32, 48)
    pixels = load_image(save(tmp_path / "a.png", array), 48, 32)
    assert pixels.shape == (1, 3, 1, 32, 48) and pixels.dtype == torch.float32
    assert torch.equal(((pixels[0, :, 0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8), torch.tensor(array))
    assert -1 <= float(pixels.min()) < float(pixels.max()) <= 1


@pytest.mark.parametrize(
    ("height", "width", "kept"),
    [
        (40, 160, (slice(None), slice(50, 110))),  # too wide: the middle columns
        (160, 60, (slice(60, 100), slice(None))),  # too tall: the middle rows
    ],
)
def test_the_middle_of_another_aspect_is_kept(tmp_path: Path, height: int, width: int, kept: tuple) -> None:
    array = np.full((height, width, 3), 255, dtype=np.uint8)
    array[kept] = (0, 0, 255)
    pixels = load_image(save(tmp_path / "a.png", array), 60, 40)
    assert pixels.shape == (1, 3, 1, 40, 60)
    assert torch.equal(pixels[0, :, 0].flatten(1).amax(1), torch.tensor([-1.0, -1.0, 1.0]))


@pytest.mark.parametrize("size", [(33, 47), (719, 1281), (10, 1000)])
def test_every_size_is_brought_to_the_wanted_one(tmp_path: Path, size: tuple[int, int]) -> None:
    assert load_image(save(tmp_path / "a.png", picture(*size)), 48, 32).shape == (1, 3, 1, 32, 48)


def test_a_smooth_picture_survives_resizing(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 96, dtype=np.float32)[None, :, None]
    array = np.broadcast_to(ramp, (64, 96, 3)).round().astype(np.uint8)
    pixels = load_image(save(tmp_path / "a.png", array), 48, 32)
    expected = torch.linspace(-1, 1, 96).view(48, 2).mean(1)
    error = float((pixels[0, 0, 0, 16] - expected).abs().max())
    print(f"a ramp at half the size: max error {error:.4f}")
    assert error < 0.02


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16"])
def test_all_kinds_of_pixels_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    source = Image.fromarray(picture(32, 48))
    image = Image.new(mode, (48, 32)) if mode == "I;16" else source.convert(mode)
    image.save(path)
    assert load_image(path, 48, 32).shape == (1, 3, 1, 32, 48)


@pytest.mark.parametrize("size", [(1, 30000), (30000, 1), (3, 20001)])
def test_a_strip_is_cropped_before_it_is_resized(tmp_path: Path, size: tuple[int, int]) -> None:
    """Resized to the width of a video it would be of gigabytes."""
    place = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    place[:, :, 1] = 100
    middle = [slice(max(0, side // 2 - 8), side // 2 + 8) for side in (size[1], size[0])]
    place[middle[0], middle[1], 0] = 255
    Image.fromarray(place).save(tmp_path / "strip.png")
    began = time.process_time()
    pixels = load_image(tmp_path / "strip.png", 480, 320)
    assert pixels.shape == (1, 3, 1, 320, 480) and time.process_time() - began < 1
    shown = ((pixels[0, :, 0] + 1) * 127.5).round()
    assert (shown[0] == 255).all() and (shown[1] == 100).all()


def test_a_phone_picture_stands_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees clockwise
    array = np.zeros((48, 32, 3), dtype=np.uint8)
    array[:, :16] = 255  # the left half lies on top after the turn
    pixels = load_image(save(tmp_path / "a.png", array, exif=exif), 48, 32)
    assert pixels[0, 0, 0, :16].mean() > 0.9 and pixels[0, 0, 0, 16:].mean() < -0.9


def truncated(path: Path) -> None:
    Image.fromarray(picture(64, 64)).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:3000])


def broken_chunk(path: Path) -> None:
    Image.fromarray(picture(64, 64)).save(path, "PNG")
    data = bytearray(path.read_bytes())
    data[60:70] = b"0123456789"
    path.write_bytes(data)


def bomb(path: Path) -> None:
    Image.new("1", (20000, 20000)).save(path, "PNG")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no such picture; give the path of a PNG, JPEG or WebP file"),
        (lambda path: path.mkdir(), "cannot be read as a picture"),
        (lambda path: path.write_bytes(b""), "cannot be read as a picture"),
        (lambda path: path.write_text("not a picture"), "cannot be read as a picture"),
        (truncated, "cannot be read as a picture"),
        (broken_chunk, "cannot be read as a picture"),
        (bomb, "cannot be read as a picture"),
    ],
)
def test_what_is_no_picture_is_named(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "cat.png"
    make(path)
    with pytest.raises(ValueError, match=message) as caught:
        load_image(path, 48, 32)
    assert str(path) in str(caught.value)
