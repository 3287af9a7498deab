"""The HunyuanVideo VAE against diffusers' AutoencoderKLHunyuanVideo, its memory, tiles and files."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from hypothesis import given, settings
from hypothesis import strategies as st
from lowvram_video.framepack.vae import blocks as vae_blocks
from lowvram_video.framepack.vae.blocks import Upsample, attend
from lowvram_video.framepack.vae.checkpoint import HUNYUAN_FORMAT, to_diffusers_names
from lowvram_video.framepack.vae.frames import Clip, FrameStore, channel_moments, variance_of
from lowvram_video.framepack.vae.model import HUNYUAN_VAE, HunyuanVAE, VAEConfig, decode_footprint
from lowvram_video.vae.files import to_channels_last
from lowvram_video.vae.tiles import plan_grid
from lowvram_video.vae.tiling import Tile, TilePlan, decode_tiled, encode_fitting, encode_tiled, plan_time
from lowvram_video.weights.files.checkpoint import CheckpointError
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")
open_vae = HUNYUAN_FORMAT.open_file
OFFICIAL = Tile(256, 16)

BOUND = 1e-5  # maximum error over the reference's maximum, in float32

TINY = {
    "halving": VAEConfig(block_out_channels=(8, 16, 32, 32), layers_per_block=2, num_groups=4),
    "uneven": VAEConfig(block_out_channels=(8, 8, 16, 24), layers_per_block=1, num_groups=4),
    "flat": VAEConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, num_groups=2),
}


def reference_vae(config: VAEConfig) -> AutoencoderKLHunyuanVideo:
    """diffusers' VAE of the same dimensions with random weights and norms, whole clips at once."""
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo(
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.num_groups,
        latent_channels=config.latent_channels,
        scaling_factor=config.scaling_factor,
    ).eval()
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    for name, parameter in vae.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    return vae


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def random_video(num_frames: int, height: int = 16, width: int = 24, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, num_frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def random_latent(num_frames: int, height: int = 4, width: int = 6, batch: int = 2) -> Tensor:
    return torch.randn(batch, 16, num_frames, height, width, generator=torch.Generator().manual_seed(2))


def smooth_latent(num_frames: int, height: int, width: int) -> Tensor:
    coarse = torch.randn(1, 16, 3, height // 2, width // 2, generator=torch.Generator().manual_seed(3))
    return torch.nn.functional.interpolate(coarse, (num_frames, height, width), mode="trilinear", align_corners=True)


@pytest.fixture(scope="module", params=list(TINY))
def pair(request: pytest.FixtureRequest) -> tuple[HunyuanVAE, AutoencoderKLHunyuanVideo]:
    config = TINY[request.param]
    reference = reference_vae(config)
    vae = HunyuanVAE(config)
    vae.load_state_dict(reference.state_dict(), strict=True)
    return vae, reference


@pytest.fixture(scope="module")
def vae() -> HunyuanVAE:
    torch.manual_seed(0)
    return HunyuanVAE(TINY["halving"])


# --- numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [1, 5, 9, 13])
def test_encode_matches_diffusers(pair, num_frames):
    vae, reference = pair
    video = random_video(num_frames)
    with torch.no_grad():
        expected = reference.encode(video).latent_dist.mode() * 0.476986
    error = relative_error(vae.encode(video), expected)
    print(f"encode {vae.config.block_out_channels}, {num_frames} frames: max relative error {error:.2e}")
    assert error <= BOUND


@pytest.mark.parametrize("num_frames", [1, 5, 9, 13])
def test_decode_matches_diffusers(pair, num_frames):
    vae, reference = pair
    latent = random_latent((num_frames - 1) // 4 + 1)
    with torch.no_grad():
        expected = reference.decode(latent / 0.476986).sample
    video = vae.decode(latent)
    error = relative_error(video, expected)
    print(f"decode {vae.config.block_out_channels}, {num_frames} frames: max relative error {error:.2e}")
    assert video.shape[2] == num_frames
    assert error <= BOUND


def test_the_released_network_has_diffusers_tensors():
    with torch.device("meta"):
        reference = AutoencoderKLHunyuanVideo()
    shapes = {name: tensor.shape for name, tensor in HunyuanVAE(device="meta").state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in reference.state_dict().items()}
    assert HUNYUAN_VAE.scaling_factor == reference.config.scaling_factor
    assert HUNYUAN_VAE.num_groups == reference.config.norm_num_groups
    assert (HUNYUAN_VAE.spatial_stride, HUNYUAN_VAE.temporal_stride) == (8, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_diffusers(pair, dtype):
    vae, reference = pair
    half = HunyuanVAE(vae.config, dtype=dtype)
    half.load_state_dict(vae.state_dict())
    half_reference = AutoencoderKLHunyuanVideo.from_config(reference.config).to(dtype).eval()
    half_reference.load_state_dict(reference.state_dict())
    latent, video = random_latent(2), random_video(5)
    with torch.no_grad():
        theirs = half_reference.decode((latent / 0.476986).to(dtype)).sample
        their_latent = half_reference.encode(video.to(dtype)).latent_dist.mode() * 0.476986
    decoded, encoded = half.decode(latent), half.encode(video)
    assert decoded.dtype == encoded.dtype == dtype
    for what, actual, other, exact in (
        ("decode", decoded, theirs, vae.decode(latent)),
        ("encode", encoded, their_latent, vae.encode(video)),
    ):
        ours, bound = ((x.float() - exact).abs().mean() / exact.std() for x in (actual, other))
        print(f"{dtype} {what}: mean error over deviation {ours:.1e}, diffusers' {bound:.1e}")
        assert ours <= 1.2 * bound


def test_channels_last_changes_nothing(pair):
    vae, _ = pair
    other = HunyuanVAE(vae.config, device="meta")
    other.load_state_dict({name: to_channels_last(each) for name, each in vae.state_dict().items()}, assign=True)
    latent, video = random_latent(3), random_video(9)
    errors = (
        relative_error(other.decode(latent), vae.decode(latent)),
        relative_error(other.encode(video), vae.encode(video)),
    )
    print(f"channels last: max relative errors {errors[0]:.2e}, {errors[1]:.2e}")
    assert max(errors) <= BOUND


def check_moments(frame):
    got, want = channel_moments(frame), torch.var_mean(frame.double(), dim=(2, 3), correction=0)
    for moment, whole in zip(got, want, strict=True):
        assert moment.dtype == torch.float32
        torch.testing.assert_close(moment.double(), whole, rtol=1e-5, atol=1e-5)  # what cancels of an even one


def frame_with_halves(dtype, layout, device="cpu", size=(5, 70)):
    frame = torch.randn(2, 8, *size, generator=torch.Generator().manual_seed(0)) * 2 + 1
    frame[..., size[1] // 2 :] += 3
    frame[:, 3], frame[:, 4] = 1.5, 0  # even ones
    return frame.to(device, dtype).contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_of_a_frame_are_those_of_all_its_pixels(dtype, layout):
    check_moments(frame_with_halves(dtype, layout))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moments_on_the_gpu_take_no_memory_to_speak_of(dtype, layout):
    frame = frame_with_halves(dtype, layout, "cuda", (640, 608))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    channel_moments(frame)
    assert torch.cuda.max_memory_allocated() - before < 4 << 20
    check_moments(frame)
    check_moments(frame_with_halves(dtype, layout, "cuda", (512, 512)))  # of even channels nothing is left


def test_an_even_channel_has_no_variance():
    assert variance_of(torch.tensor([0.0, 0.5])).tolist() == [0.0, 4.0]


@pytest.mark.parametrize("temporal", [False, True])
def test_upsampling_equals_repeating_then_convolving(temporal):
    torch.manual_seed(0)
    layer = Upsample(6, temporal).requires_grad_(False)
    frames = torch.randn(2, 6, 4, 3, 5)
    clip = Clip(FrameStore())
    for frame in frames.unbind(2):
        clip.append(frame)
    enlarged = frames.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
    if temporal:
        enlarged = enlarged.repeat_interleave(2, dim=2)[:, :, 1:]
    padded = torch.nn.functional.pad(enlarged, (1, 1, 1, 1, 2, 0), mode="replicate")
    expected = layer.conv.conv(padded)
    out = layer(clip)
    actual = torch.stack([out.take(index) for index in range(len(out))], dim=2)
    error = relative_error(actual, expected)
    print(f"folded upsampling, temporal {temporal}: max relative error {error:.2e}")
    assert error <= 1e-6


def test_attention_in_pieces_is_the_same(monkeypatch):
    q, k, v = torch.randn(3, 2, 1, 12, 8).unbind(0)
    whole = attend(q, k, v)
    monkeypatch.setattr(vae_blocks, "MAX_SCORES", 2 * 12 * 5)
    assert torch.allclose(attend(q, k, v), whole, atol=1e-6)


# --- memory ----------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations return, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _freed(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live -= num_bytes


# bf16 convolutions take minutes on a CPU; what is held is the same without numbers, as fp32's two show
@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.float32, "cpu"), (torch.float32, "meta"), (torch.bfloat16, "meta")]
)
@pytest.mark.parametrize(("num_frames", "height", "width"), [(3, 16, 12), (6, 8, 12), (9, 8, 8)])
def test_decoding_takes_what_the_footprint_says(dtype, device, num_frames, height, width):
    config = VAEConfig(block_out_channels=(16, 32, 64, 64), layers_per_block=1, num_groups=4)
    vae = HunyuanVAE(config, dtype=dtype).to(device)
    latent = random_latent(num_frames, height, width, batch=1).to(device)
    with LiveBytes() as counted:
        vae.decode(latent)
    predicted = decode_footprint(config, num_frames, 8 * height, 8 * width, dtype.itemsize)
    ratio = predicted.total_bytes / counted.peak
    print(f"{dtype} {num_frames} x {height} x {width}: {counted.peak} bytes live, predicted {ratio:.3f} of it")
    assert 0.97 <= ratio <= 1.1


def test_footprint_of_the_released_network():
    """33 frames of 640x608: the clips are 256 numbers per pixel and frame."""
    footprint = decode_footprint(HUNYUAN_VAE, 9, 608, 640, 2)
    assert footprint.clip_bytes == 256 * 33 * 608 * 640 * 2
    assert 1.0 < footprint.scratch_bytes / (1280 * 608 * 640 * 2) < 1.02


@pytest.mark.parametrize("share", [0.0, 0.3, 2.0])
def test_spilled_frames_change_no_bit(pair, share):
    vae, _ = pair
    latent = random_latent(3)
    footprint = decode_footprint(vae.config, 3, 32, 48, 4)
    allocated: list[int] = []

    def allocate(num_bytes: int) -> Tensor:
        allocated.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    store = FrameStore(int(share * 2 * footprint.clip_bytes), allocate)  # a batch of two
    for _ in range(2):  # a store serves one pass after the other
        assert torch.equal(vae.decode(latent, store), vae.decode(latent))
    assert torch.equal(vae.encode(random_video(5), store), vae.encode(random_video(5)))
    assert store._used_bytes == 0
    assert bool(allocated) == (share < 1)


def test_spilled_channels_last_half_precision_too():
    torch.manual_seed(0)
    vae = HunyuanVAE(TINY["halving"], dtype=torch.bfloat16)
    vae.load_state_dict({name: to_channels_last(each) for name, each in vae.state_dict().items()}, assign=True)
    latent = random_latent(2)
    assert torch.equal(vae.decode(latent, FrameStore(0)), vae.decode(latent))


def test_host_buffers_are_used_again():
    sizes: list[int] = []

    def allocate(num_bytes: int) -> Tensor:
        sizes.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    store = FrameStore(0, allocate)
    kept = store.keep(torch.ones(1, 8, 4, 4))
    store.drop(kept)
    halves = [store.keep(torch.full((1, 4, 4, 4), value)) for value in (1.0, 2.0)]
    assert [store.load(half).mean().item() for half in halves] == [1.0, 2.0]
    assert sizes == [8 * 16 * 4]


# --- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((1, 3, 6, 32, 32), ("6 frames", "4n+1", "5 or 9")),
        ((1, 3, 5, 30, 32), ("32x30", "divide by 8", "32x32")),
        ((1, 4, 5, 32, 32), ("[1, 4, 5, 32, 32]", "alpha")),
    ],
)
def test_a_video_that_does_not_fit_is_refused_with_the_fix(shape, parts):
    with pytest.raises(ValueError, match="HunyuanVideo VAE") as error:
        HunyuanVAE(device="meta").encode(torch.zeros(shape))
    for part in parts:
        assert part in str(error.value)


def test_a_latent_that_does_not_fit_is_refused():
    vae = HunyuanVAE(device="meta")
    with pytest.raises(ValueError, match="48 channels, but the HunyuanVideo VAE decodes 16"):
        vae.decode(torch.zeros(1, 48, 1, 4, 4))
    with pytest.raises(ValueError, match="video of one frame"):
        vae.decode(torch.zeros(1, 16, 4, 4))


# --- tiles -----------------------------------------------------------------------------------------------


def test_one_tile_equals_untiled_exactly(vae):
    for num_latents in (1, 3):
        latent = random_latent(num_latents)
        assert torch.equal(decode_tiled(vae, latent, OFFICIAL), vae.decode(latent))
        video = random_video(4 * num_latents - 3)
        assert torch.equal(encode_tiled(vae, video, OFFICIAL), vae.encode(video))


@settings(max_examples=80, deadline=None)
@given(
    num_latents=st.integers(1, 60), tile=st.integers(1, 20), overlap=st.integers(0, 19), step=st.sampled_from([1, 4])
)
def test_temporal_tiles_cover_every_frame_once(num_latents, tile, overlap, step):
    if overlap >= tile:
        return
    plan = TilePlan(plan_grid(1, 1, 8, 0, 8), plan_time(num_latents, tile, overlap))
    total = torch.zeros((num_latents - 1) * step + 1)
    for place in plan.places():
        window, kept = plan.window(place, step)[2], plan.kept_window(place, step)[2]
        assert (kept.start - window.start, kept.stop) == (plan.num_leading(place), window.stop)
        assert (window.stop - window.start - 1) // step <= tile
        total[kept] += plan.time_weights(place, step)
    assert (total - 1).abs().max() < 1e-6


def test_temporal_tiles_are_balanced():
    assert plan_time(18, 16, 4).starts == (0, 6)  # of 11, not two of 16 that share 15
    assert plan_time(17, 16, 4).starts == (0,)
    assert plan_time(37, None, 0).starts == (0,)


def test_tiles_are_decoded_alone_and_blended(vae):
    """Two temporal tiles of three latents and one: the second gives up the frame of its first latent."""
    latent = random_latent(5)
    video = decode_tiled(vae, latent, Tile(256, 2, latent_overlap=0))
    assert torch.equal(video[:, :, :9], vae.decode(latent[:, :, :3]))
    assert torch.equal(video[:, :, 9:], vae.decode(latent[:, :, 2:])[:, :, 1:])
    left, right = vae.decode(latent[:, :, :4]), vae.decode(latent[:, :, 1:])[:, :, 1:]
    ramp = ((torch.arange(8) + 0.5) / 8)[:, None, None]
    expected = torch.cat([left[:, :, :5], left[:, :, 5:] * (1 - ramp) + right[:, :, :8] * ramp, right[:, :, 8:]], 2)
    blended = decode_tiled(vae, latent, Tile(256, 3, latent_overlap=2))
    assert (blended - expected).abs().max() < 1e-6


def test_encoded_tiles_are_those_of_their_frames(vae):
    video = random_video(17, 16, 32)
    latent = encode_tiled(vae, video, Tile(16, 2, 0, 0))
    assert torch.equal(latent[:, :, :3, :, :2], vae.encode(video[:, :, :9, :, :16]))
    assert torch.equal(latent[:, :, 3:, :, 2:], vae.encode(video[:, :, 8:, :, 16:])[:, :, 1:])


@pytest.mark.parametrize("failures", [0, 1, 2, 3])
def test_a_clip_that_the_device_does_not_hold_is_encoded_in_tiles(vae, failures, monkeypatch, caplog):
    clip, tries = random_video(5, 128, 192, batch=1), []
    ways = [None, Tile(128), Tile(256, 16), Tile(128, 16)]
    want = encode_tiled(vae, clip, ways[failures]) if failures else vae.encode(clip)

    def encode(pixels, *store):
        tries.append(pixels.shape[-1])
        if len(tries) <= failures:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return HunyuanVAE.encode(vae, pixels, *store)

    monkeypatch.setattr(vae, "encode", encode)
    got = encode_fitting(vae, clip)
    assert got.shape == want.shape and got.dtype == torch.float32 and got.device.type == "cpu"
    assert torch.equal(got, want)
    assert tries[:4] == [192, 128, 192, 128][: failures + 1] + tries[failures + 1 : 4]
    told = ["128 pixels", "256 pixels, 16 latents of time at once", "128 pixels, 16 latents of time at once"][:failures]
    assert [line.rpartition("tiles of ")[2] for line in caplog.messages if "encoding 5 frames" in line] == told


def test_tiles_of_an_even_surface_are_those_of_the_whole(pair):
    """Equal latents everywhere give every tile the statistics of the whole, and replicated borders continue it."""
    vae, _ = pair
    latent = random_latent(1, 1, 1).expand(-1, -1, 5, 6, 6)
    error = relative_error(decode_tiled(vae, latent, Tile(32, 3, 16, 1)), vae.decode(latent))
    print(f"tiles of an even surface: max relative error {error:.1e}")
    # A group of two channels that hardly vary has a variance near eps: its norm magnifies the rounding of the sums.
    assert error < 2e-3


@pytest.mark.parametrize("tile", [Tile(48, overlap=16), Tile(512, 3, 0, 1), Tile(48, 3, 16, 1)])
def test_tiles_are_within_the_documented_bound_for_smooth_latents(vae, tile):
    """Not equal: the norms and the attention see only the tile, which random weights answer to strongly."""
    latent = smooth_latent(5, 8, 12)
    whole, tiled = vae.decode(latent), decode_tiled(vae, latent, tile)
    error = ((tiled - whole).abs().mean() / whole.std()).item()
    print(f"tiles {tile}: mean error over deviation {error:.3f}")
    assert 0 < error < 1


def test_a_half_precision_vae_gives_half_precision_video():
    vae = HunyuanVAE(TINY["uneven"], dtype=torch.bfloat16)
    latent = random_latent(2)
    video = decode_tiled(vae, latent, OFFICIAL)
    assert video.dtype == torch.float16
    assert torch.equal(video, vae.decode(latent).to(torch.float16))
    assert decode_tiled(vae, latent, Tile(24, 16, 8)).isfinite().all()


def test_progress_counts_tiles_and_may_stop(vae):
    calls: list[tuple[int, int]] = []
    decode_tiled(vae, random_latent(3, 2, 3), Tile(16, 1, 8, 0), lambda *call: calls.append(call))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]

    class Stop(Exception):
        pass

    def stop(done: int, _total: int) -> None:
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        encode_tiled(vae, random_video(9, 16, 24), Tile(16, 1, 8, 0), stop)


def test_impossible_tiles_are_refused_with_the_fix(vae):
    with pytest.raises(ValueError, match=r"a tile of 64 pixels that overlaps by 64.*Try"):
        decode_tiled(vae, random_latent(3, 10, 10), Tile(64, overlap=64))
    for size, shared in ((0, 0), (2, 2), (2, -1)):
        with pytest.raises(ValueError, match=rf"temporal tile of {size} latent frames that overlaps by {shared}.*Try"):
            decode_tiled(vae, random_latent(5), Tile(256, size, latent_overlap=shared))


# --- files -----------------------------------------------------------------------------------------------


def comfy_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers state dict as ComfyUI's and the latent diffusion code's layout has it."""
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in (
            *((f"encoder.down_blocks.{i}.", f"encoder.down.{i}.") for i in range(4)),
            *((f"decoder.up_blocks.{i}.", f"decoder.up.{3 - i}.") for i in range(4)),
            ("mid_block.resnets.0.", "mid.block_1."),
            ("mid_block.resnets.1.", "mid.block_2."),
            ("mid_block.attentions.0.", "mid.attn_1."),
            (".resnets.", ".block."),
            ("downsamplers.0.", "downsample."),
            ("upsamplers.0.", "upsample."),
            ("conv_norm_out", "norm_out"),
            ("conv_shortcut", "nin_shortcut"),
            ("attn_1.group_norm", "attn_1.norm"),
            ("to_out.0", "proj_out"),
            *((f"attn_1.to_{letter}.", f"attn_1.{letter}.") for letter in "qkv"),
        ):
            name = name.replace(old, new)
        is_matrix = "attn_1" in name and tensor.ndim == 2
        renamed[name] = tensor[:, :, None, None, None] if is_matrix else tensor
    return renamed


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize("layout", ["diffusers", "comfy"])
@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_a_file_loads_as_it_was_saved(vae, layout, prefix, tmp_path):
    tensors = dict(vae.state_dict()) if layout == "diffusers" else comfy_tensors(vae.state_dict())
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    if prefix:
        tensors["model.diffusion_model.head.weight"] = torch.zeros(2)
    path = saved(tmp_path / "vae.safetensors", tensors)
    loaded = open_vae(path).build(torch.float32, CPU)
    assert loaded.config.block_out_channels == vae.config.block_out_channels
    assert loaded.config.layers_per_block == vae.config.layers_per_block
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for name, tensor in vae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_each_half_works_without_the_other(vae, tmp_path):
    opened = open_vae(saved(tmp_path / "vae.safetensors", dict(vae.state_dict())))
    encoder, decoder, both = (opened.build(torch.float32, CPU, half) for half in ("encoder", "decoder", None))
    latent, video = random_latent(2), random_video(5)
    assert torch.equal(encoder.encode(video), both.encode(video))
    assert torch.equal(decoder.decode(latent), both.decode(latent))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float16, torch.float32])
def test_a_file_runs_in_the_dtype_asked_for(vae, stored, wanted, tmp_path):
    path = saved(tmp_path / "vae.safetensors", {n: t.to(stored) for n, t in comfy_tensors(vae.state_dict()).items()})
    loaded = open_vae(path).build(wanted, CPU)
    expected = vae.state_dict()["decoder.mid_block.attentions.0.to_q.weight"].to(stored).to(wanted)
    assert torch.equal(loaded.decoder.mid_block.attentions[0].to_q.weight, expected)
    assert loaded.decode(random_latent(1, 2, 2)).dtype == wanted


def test_names_of_the_released_comfyui_file():
    names = {
        "decoder.conv_in.conv.weight": "decoder.conv_in.conv.weight",
        "decoder.mid.attn_1.norm.weight": "decoder.mid_block.attentions.0.group_norm.weight",
        "decoder.mid.attn_1.proj_out.bias": "decoder.mid_block.attentions.0.to_out.0.bias",
        "decoder.mid.block_2.norm1.bias": "decoder.mid_block.resnets.1.norm1.bias",
        "decoder.norm_out.weight": "decoder.conv_norm_out.weight",
        "decoder.up.0.block.0.nin_shortcut.conv.weight": "decoder.up_blocks.3.resnets.0.conv_shortcut.conv.weight",
        "decoder.up.3.upsample.conv.conv.weight": "decoder.up_blocks.0.upsamplers.0.conv.conv.weight",
        "encoder.down.1.downsample.conv.conv.bias": "encoder.down_blocks.1.downsamplers.0.conv.conv.bias",
        "encoder.down.2.block.1.conv2.conv.weight": "encoder.down_blocks.2.resnets.1.conv2.conv.weight",
        "quant_conv.weight": "quant_conv.weight",
    }
    assert to_diffusers_names(names) == names


def test_the_released_dimensions_come_from_shapes(vae, tmp_path):
    config = VAEConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1)
    path = saved(tmp_path / "vae.safetensors", HunyuanVAE(config).state_dict())
    assert open_vae(path).config == config


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["decoder.middle.0.residual.0.gamma", "conv2.weight"], "a Wan VAE"),
        (["blocks.0.cross_attn.norm_q.weight", "patch_embedding.weight"], "a Wan transformer"),
        (["decoder.conv_in.weight", "decoder.conv_out.weight", "post_quant_conv.weight"], "an image VAE"),
        (["clean_x_embedder.proj_4x.weight"], "a FramePack transformer"),
    ],
)
def test_another_file_is_named(names, what, tmp_path):
    path = saved(tmp_path / "other.safetensors", {name: torch.zeros(1) for name in names})
    with pytest.raises(CheckpointError, match="expected a HunyuanVideo VAE") as error:
        open_vae(path)
    for part in (str(path), f"is {what}", "hunyuan_video_vae_bf16.safetensors"):
        assert part in str(error.value)


def test_an_incomplete_file_is_refused(vae, tmp_path):
    tensors = dict(vae.state_dict())
    decoder = {name: tensor for name, tensor in tensors.items() if not name.startswith("encoder.")}
    with pytest.raises(CheckpointError, match="encoder and decoder in one file"):
        open_vae(saved(tmp_path / "decoder.safetensors", decoder))
    tensors["decoder.conv_norm_out.weight"] = tensors["decoder.conv_norm_out.weight"][:3]
    with pytest.raises(CheckpointError, match=r"decoder\.conv_norm_out\.weight .* is \[3\]; expected \[8\]"):
        open_vae(saved(tmp_path / "short.safetensors", tensors))
    del tensors["decoder.conv_norm_out.weight"]
    with pytest.raises(CheckpointError, match=r"decoder\.conv_norm_out\.weight .* is nothing"):
        open_vae(saved(tmp_path / "less.safetensors", tensors))


def test_a_vae_of_another_generation_is_refused(tmp_path):
    config = VAEConfig(block_out_channels=(4, 4, 4, 4), layers_per_block=1, latent_channels=32, num_groups=2)
    path = saved(tmp_path / "other.safetensors", HunyuanVAE(config).state_dict())
    with pytest.raises(CheckpointError, match="32 latent channels; expected 16"):
        open_vae(path)
