"""FlashVSR's parts one by one: projection, windows, masks, transformer, decoder; at most 1e-4 from two others.

One is the reference in plain PyTorch, the other the public code (OpenImagingLab/FlashVSR at ccac0ac) where
FLASHVSR_PUBLIC names a checkout; its block-sparse kernel is replaced by masked softmax, and the projection of version
1.1, which it lacks, by its own layers with the caches of that version. The whole way beside the reference is in
`test_upscale.py`, beside the public code here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from lowvram_video.benchmarks.public_flashvsr import PublicCode, import_public, masked_attention
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.vae.tiny import Memory, TinyVAE
from lowvram_video.wanvideo.network.embeddings import AxisPositions
from lowvram_video.wanvideo.network.upscaling import UpscalingModel, WindowExtras
from lowvram_video.wanvideo.network.windows import (
    PUBLISHED_PIXELS,
    WindowPass,
    WindowSettings,
    block_order,
    choose_blocks,
    near_blocks,
)
from lowvram_video.wanvideo.upscale.decoder import decode_next
from lowvram_video.wanvideo.upscale.frames import enlarged
from lowvram_video.wanvideo.upscale.host_windows import HostWindows, WindowSize
from lowvram_video.wanvideo.upscale.projection import LowQualityProjection
from lowvram_video.wanvideo.upscale.request import UpscaleFiles, UpscaleRequest
from lowvram_video.wanvideo.upscale.run import Upscaler
from lowvram_video.wanvideo.upscale.stream import UpscaleStream
from safetensors.torch import load_file
from torch import Tensor

from . import flashvsr_reference as reference
from .tiny_flashvsr import CONFIG, DECODER, PROJECTION, save_flashvsr, small_video

BOUND = 1e-4
WIDTH, HEIGHT = 384, 256  # 3 x 2 blocks
GRID = HEIGHT // 16, WIDTH // 16
BLOCKS = WIDTH * HEIGHT // 128**2
PAIRS, RANGE, KEPT = 20, 3, 2  # pairs of blocks for a head and window, local range, windows remembered
SPARSE_RATIO = (PAIRS + 1) / BLOCKS**2 * WIDTH * HEIGHT / PUBLISHED_PIXELS
PASSES = (6, 2, 2, 2)  # latent frames; the last one forgets a window
CPU = torch.device("cpu")


class Reference:
    """`flashvsr_reference`, whose transformer makes masks for itself."""

    def __init__(self, files: UpscaleFiles) -> None:
        self._files = files

    def project(self, frames: Tensor, causal: bool) -> list[list[Tensor]]:
        weights = {name.removeprefix("LQ_proj_in."): each for name, each in load_file(self._files.projection).items()}
        return reference.project(weights, frames[0], causal)

    @cached_property
    def transformer(self) -> reference.Transformer:
        text = load_file(self._files.prompt)["context"][0]
        return reference.Transformer(load_file(self._files.model), text, CONFIG.num_heads, (PAIRS, RANGE), KEPT)

    def velocities(self, latents: Sequence[Tensor], additions: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        firsts = [sum(PASSES[:index]) for index in range(len(PASSES))]
        given = zip(latents, firsts, additions, strict=True)
        return [self.transformer(latent[0], first, list(added))[None] for latent, first, added in given]

    def order(self) -> Tensor:
        return self.transformer._blocks((2, *GRID)).argsort(stable=True)

    def keep(self, q: Tensor, keys: Tensor) -> Tensor:
        block = self.transformer._blocks((2, *GRID)).sort().values
        return self.transformer._keep(q, keys, block, BLOCKS, (2, *GRID))

    def decode(self, latent: Tensor, shown: Tensor) -> Tensor:
        return reference.decode(load_file(self._files.decoder), latent[0], shown[0])[None]


class Public:
    """The public code."""

    def __init__(self, files: UpscaleFiles, code: PublicCode) -> None:
        self._files, self._code = files, code

    def project(self, frames: Tensor, causal: bool) -> list[list[Tensor]]:
        made = self._code.projection(self._files, causal)
        clips = [frames[:, :, :1], *frames[:, :, 1:].split(4, 2)]
        tokens = [made.stream_forward(clip) for clip in clips]
        return [[layer[0] for layer in each] for each in tokens if each is not None]

    def velocities(self, latents: Sequence[Tensor], additions: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        pipe = self._code.whole(self._files, CONFIG, CPU, torch.float32)
        keys: Any = [None] * CONFIG.num_layers
        values: Any = [None] * CONFIG.num_layers
        made = []
        for index, (latent, added) in enumerate(zip(latents, additions, strict=True)):
            velocity, keys, values = self._code.pipeline.model_fn_wan_video(
                pipe.dit, x=latent, timestep=pipe.timestep, context=None, LQ_latents=[each[None] for each in added],
                is_stream=True, pre_cache_k=keys, pre_cache_v=values, topk_ratio=(PAIRS + 1.5) / BLOCKS**2,
                kv_ratio=KEPT, cur_process_idx=index, t_mod=pipe.t_mod, t=pipe.t, local_range=RANGE,
            )  # fmt: skip
            made.append(velocity)
        return made

    def order(self) -> Tensor:
        places = torch.arange(2 * math.prod(GRID)).view(1, 2, *GRID, 1)
        return self._code.network.WindowPartition3D.partition(places, (2, 8, 8)).flatten()

    def keep(self, q: Tensor, keys: Tensor) -> Tensor:
        near = self._code.network.build_local_block_mask_shifted_vec_normal_slide(GRID[0] // 8, GRID[1] // 8, 3, 3)
        blocks = [each.flatten(1).unflatten(0, (-1, 128)) for each in (q, keys)]
        return self._code.network.generate_draft_block_mask(1, CONFIG.num_heads, 1, *blocks, PAIRS, near)[0]

    def decode(self, latent: Tensor, shown: Tensor) -> Tensor:
        made = self._code.decoder(self._files, CPU, torch.float32)
        return made.decode_video(latent.transpose(1, 2), parallel=False, cond=shown).transpose(1, 2)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> UpscaleFiles:
    return save_flashvsr(tmp_path_factory.mktemp("flashvsr"))


@pytest.fixture(scope="module")
def code() -> PublicCode:
    if "FLASHVSR_PUBLIC" not in os.environ:
        pytest.skip("FLASHVSR_PUBLIC names no checkout of OpenImagingLab/FlashVSR")
    return import_public(Path(os.environ["FLASHVSR_PUBLIC"]), masked_attention)


@pytest.fixture(scope="module", params=["reference", "public"])
def other(request: pytest.FixtureRequest, files: UpscaleFiles) -> Reference | Public:
    return Reference(files) if request.param == "reference" else Public(files, request.getfixturevalue("code"))


def near(ours: Tensor, theirs: Tensor, what: str) -> None:
    assert ours.shape == theirs.shape
    error, deviation = float((ours - theirs).abs().max()), float(theirs.std())
    print(f"{what}: {error:.1e}, deviation {deviation:.1e}")
    assert error <= BOUND * min(1.0, deviation)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("causal", [True, False])
@torch.inference_mode()
def test_projection(files: UpscaleFiles, other: Reference | Public, causal: bool) -> None:
    network = LowQualityProjection(PROJECTION)
    weights = {name.removeprefix("LQ_proj_in."): each for name, each in load_file(files.projection).items()}
    network.load_state_dict(weights)
    frames = random(1, 3, 13, 64, 96).clamp(-1, 1)
    seen = network.begin(frames[:, :, :1], causal)
    theirs = other.project(frames, causal)
    for number, clip in enumerate(frames[:, :, 1:].split(4, 2)):
        tokens, seen = network(clip, seen, causal)
        assert len(tokens) == len(theirs[number]) == 2
        for made, want in zip(tokens, theirs[number], strict=True):
            near(made, want, f"projection, clip {number}")


def test_windows(other: Reference | Public) -> None:
    assert torch.equal(block_order((2, *GRID), CPU), other.order())


@torch.inference_mode()
def test_masks(other: Reference | Public) -> None:
    """Of a window that sees two earlier ones."""
    q, keys = (
        random(count * BLOCKS * 128, CONFIG.num_heads, CONFIG.head_dim, seed=count) + means
        for count, means in ((1, 0.2), (3, 0.1))
    )
    ours = choose_blocks(
        *(each.unflatten(0, (-1, 128)).mean(1) for each in (q, keys)),
        near_blocks((2, *GRID), RANGE, CPU), 1, WindowSettings(SPARSE_RATIO * 1.0001, RANGE),
    )  # fmt: skip
    theirs = other.keep(q, keys)
    assert torch.equal(ours, theirs)
    assert ours.flatten(1).sum(1).tolist() == [PAIRS] * CONFIG.num_heads


@torch.inference_mode()
def test_transformer(files: UpscaleFiles, other: Reference | Public) -> None:
    """Four passes, each of which sees what was kept of those before."""
    network = UpscalingModel(CONFIG)
    network.load_state_dict(load_file(files.model))
    windows = HostWindows(WindowSize(CONFIG.num_layers, 2 * math.prod(GRID), CONFIG.dim, torch.float32, KEPT), CPU)
    latents = [random(1, 16, count, HEIGHT // 8, WIDTH // 8, seed=index) for index, count in enumerate(PASSES)]
    additions = [
        tuple(random(count * math.prod(GRID), CONFIG.dim, seed=10 * index + layer) for layer in range(2))
        for index, count in enumerate(PASSES)
    ]
    context = network.embed_context(load_file(files.prompt)["context"])
    settings, first, ours = WindowSettings(SPARSE_RATIO * 1.0001, RANGE), 0, []
    for latent, added in zip(latents, additions, strict=True):
        windows.begin_pass()
        state = WindowPass(windows, settings, additions=added, first_frame=first)
        extras = WindowExtras(positions=AxisPositions(shift=(float(first), 0.0, 0.0)), window=state)
        ours.append(network(latent, torch.tensor([1000.0]), context, extras=extras))
        windows.commit()
        first += latent.shape[2]
    windows.release()
    for number, (made, want) in enumerate(zip(ours, other.velocities(latents, additions), strict=True)):
        near(made, want, f"transformer, pass {number}")


@torch.inference_mode()
def test_decoder(files: UpscaleFiles, other: Reference | Public) -> None:
    network = TinyVAE(DECODER)
    network.load_state_dict(load_file(files.decoder))
    latents, shown = random(1, 16, 3, 8, 12), random(1, 3, 9, 64, 96).clamp(-1, 1)
    memory: Memory = {}
    parts = zip(latents.unbind(2), shown.split([1, 4, 4], 2), strict=True)
    ours = torch.cat([decode_next(network, latent, frames, memory) for latent, frames in parts], dim=2)
    near(ours, other.decode(latents, shown), "decoder")


@pytest.mark.parametrize("version", ["1.1", "1"])
def test_the_whole_way_is_the_public_codes(
    files: UpscaleFiles, code: PublicCode, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = UpscaleRequest(seed=7, version=version, sparse_ratio=0.1, local_range=3, kept_windows=KEPT)
    noise, own_noise = [], UpscaleStream.noise

    def noted(stream: UpscaleStream, num_latents: int) -> Tensor:
        noise.append(own_noise(stream, num_latents))
        return noise[-1]

    monkeypatch.setattr(UpscaleStream, "noise", noted)
    small = small_video(37, 128, 64)  # which needs no padding
    width, height = request.size(128, 64)
    ours = torch.cat(list(Upscaler(files, RunSettings()).frames(iter([small]), request, (128, 64))))
    pipe = code.whole(files, CONFIG, CPU, torch.float32)
    pipe.dit.LQ_proj_in = code.projection(files, request.is_causal)
    pipe.generate_noise = lambda *_, **__: torch.cat(noise, 2)
    shown = torch.stack([enlarged(frame, (width, height), (width, height)) for frame in [*small, *[small[-1]] * 4]], 1)
    theirs = pipe(
        cfg_scale=1.0, num_frames=len(small) + 4, height=height, width=width, LQ_video=shown[None], if_buffer=True,
        topk_ratio=0.1 * PUBLISHED_PIXELS / (height * width), kv_ratio=KEPT, local_range=3,
    )  # fmt: skip
    levels = (theirs.permute(1, 2, 3, 0) + 1) * 127.5
    assert levels.std() > 10
    error = float((ours - levels).abs().max())
    print(f"whole way, {version}: {error:.4f} of 255 levels, half a level of them rounding")
    assert error < 0.5 + 127.5 * BOUND
