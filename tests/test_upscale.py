"""FlashVSR's parts and its whole way from small frames to large ones, beside a reference in plain PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lowvram_video.attention.masked import GatheredBlocks
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.wanvideo.network.windows import WindowSettings
from lowvram_video.wanvideo.upscale import decoder
from lowvram_video.wanvideo.upscale.frames import enlarged
from lowvram_video.wanvideo.upscale.request import UpscaleFiles, UpscaleRequest, files_of
from lowvram_video.wanvideo.upscale.run import Upscaler
from lowvram_video.wanvideo.upscale.stream import SEED_STEP, UpscaleStream, window_seed
from lowvram_video.weights.files.checkpoint import CheckpointError
from lowvram_video.weights.lora.file import LoraChoice
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import flashvsr_reference as reference
from .tiny_flashvsr import CONFIG, save_flashvsr, small_video

WIDTH, HEIGHT = 96, 64  # of the small video; the large one is padded to 256 x 128
REQUEST = UpscaleRequest(seed=7, sparse_ratio=0.1, local_range=1, kept_windows=2)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> UpscaleFiles:
    return save_flashvsr(tmp_path_factory.mktemp("flashvsr"))


def upscaled(files: UpscaleFiles, small: Tensor, request: UpscaleRequest = REQUEST, **settings: object) -> Tensor:
    upscaler = Upscaler(files, RunSettings(**settings))  # type: ignore[arg-type]
    pieces: Iterator[Tensor] = iter(small.split(7))
    return torch.cat(list(upscaler.frames(pieces, request, (small.shape[2], small.shape[1]))))


def by_reference(files: UpscaleFiles, small: Tensor, request: UpscaleRequest, noise: list[Tensor]) -> Tensor:
    """The whole pipeline, `[3, T, H, W]` in -1 ... 1, of 8n - 3 frames."""
    size = (2 * small.shape[2], 2 * small.shape[1])
    padded = (-(-size[0] // 128) * 128, -(-size[1] // 128) * 128)
    shown = torch.stack([enlarged(frame, size, padded) for frame in [*small, *[small[-1]] * 4]], 1)
    projection, decoder, model, text = (
        load_file(path) for path in (files.projection, files.decoder, files.model, files.prompt)
    )
    weights = {name.removeprefix("LQ_proj_in."): tensor for name, tensor in projection.items()}
    clips = reference.project(weights, shown, request.version != "1")
    blocks = padded[0] * padded[1] // 128**2
    pairs = int(blocks**2 * (request.sparse_ratio * 768 * 1280 / (padded[0] * padded[1]))) - 1
    sparse = (max(0, pairs), request.local_range)
    network = reference.Transformer(model, text["context"][0], CONFIG.num_heads, sparse, request.kept_windows)
    latents, first = [], 0
    for part in noise:
        frames = part.shape[1]
        additions = [torch.cat(layer) for layer in zip(*clips[first : first + frames], strict=True)]
        latents.append(part - network(part, first, additions))
        first += frames
    made = reference.decode(decoder, torch.cat(latents, 1), shown[:, :-4])
    visible = (slice(None), slice(None), slice(size[1]), slice(size[0]))
    return reference.recolour(made[visible] * 2 - 1, shown[:, :-4][visible]).clamp(-1, 1)


@pytest.mark.parametrize("version", ["1.1", "1"])
def test_the_whole_way_is_the_references(files: UpscaleFiles, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    request = replace(REQUEST, version=version)
    small, noise = small_video(37, WIDTH, HEIGHT), []
    given = UpscaleStream.noise

    def noted(stream: UpscaleStream, num_latents: int) -> Tensor:
        noise.append(given(stream, num_latents))
        return noise[-1]

    monkeypatch.setattr(UpscaleStream, "noise", noted)
    ours = upscaled(files, small, request)
    want = by_reference(files, small, request, [part[0] for part in noise])
    assert ours.shape == (37, 2 * HEIGHT, 2 * WIDTH, 3)
    levels = (want.permute(1, 2, 3, 0) + 1) * 127.5
    assert levels.std() > 10
    assert float((ours - levels).abs().max()) < 0.5 + 127.5e-4  # rounding, and 1e-4 of -1 ... 1


def test_a_head_at_a_time_is_all_heads(files: UpscaleFiles) -> None:
    small = small_video(29, WIDTH, HEIGHT)
    whole = upscaled(files, small)
    upscaler = Upscaler(files, RunSettings())
    start = upscaler.model.start

    def in_groups(plan: object, ring: object = None) -> None:
        start(plan, ring)  # type: ignore[arg-type]
        upscaler.model.model.execution = replace(upscaler.model.model.execution, head_groups=2, token_chunk=256)

    upscaler.model.start = in_groups  # type: ignore[method-assign, assignment]
    grouped = torch.cat(list(upscaler.frames(iter([small]), REQUEST, (WIDTH, HEIGHT))))
    assert int((grouped.int() - whole.int()).abs().max()) <= 1


@pytest.mark.parametrize("num_frames", [1, 22, 26])
def test_as_many_frames_come_as_went_in(files: UpscaleFiles, num_frames: int) -> None:
    long = small_video(30, WIDTH, HEIGHT)
    made = upscaled(files, long[:num_frames])
    assert len(made) == num_frames
    if num_frames > 25:  # what comes later changes nothing before it
        assert torch.equal(made[:21], upscaled(files, long)[:21])


def test_dense_attention_sees_all(files: UpscaleFiles) -> None:
    small = small_video(21, WIDTH, HEIGHT)
    dense = upscaled(files, small, replace(REQUEST, sparse_ratio=0.0))
    all_near = upscaled(files, small, replace(REQUEST, sparse_ratio=16.0, local_range=101))
    # of the pairs the one with the least share is left out
    assert float((dense.float() - all_near.float()).abs().mean()) < 1.5
    assert not torch.equal(dense, upscaled(files, small))


def test_a_lora_is_as_its_weights_merged(files: UpscaleFiles, tmp_path: Path) -> None:
    small, name, strength = small_video(21, WIDTH, HEIGHT), "blocks.1.ffn.0", 0.5
    down, up = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((4, 96), (128, 4)))
    path = tmp_path / "lora.safetensors"
    save_file({f"diffusion_model.{name}.lora_down.weight": down, f"diffusion_model.{name}.lora_up.weight": up}, path)
    weights = load_file(files.model)
    weights[f"{name}.weight"] += strength * up @ down
    merged = tmp_path / "merged.safetensors"
    save_file(weights, merged, {"lowvram_video.num_heads": str(CONFIG.num_heads)})
    with_lora = replace(files, loras=(LoraChoice(path, strength),))
    made, want = upscaled(with_lora, small), upscaled(replace(files, model=merged), small)
    assert int((made.int() - want.int()).abs().max()) <= 1
    plain = upscaled(files, small)
    assert float((made.float() - plain.float()).abs().mean()) > 5 * float((made.float() - want.float()).abs().mean())
    keys = [Upscaler(each, RunSettings()).run_settings(REQUEST)["loras"] for each in (files, with_lora)]
    assert keys[0] != keys[1]


def test_quantised_weights_are_near(files: UpscaleFiles) -> None:
    small = small_video(21, WIDTH, HEIGHT)
    exact, packed = upscaled(files, small), upscaled(files, small, quantization="int8")
    assert float((packed.float() - exact.float()).abs().mean()) < 3


def test_small_frames_are_pillows() -> None:
    frame = small_video(1)[0]
    picture = Image.fromarray(frame.numpy()).resize((192, 128), Image.Resampling.BICUBIC)
    want = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
    got = enlarged(frame, (192, 128), (256, 128))
    assert float((got[:, :, :192] - want).abs().max()) < 1.5 / 127.5  # Pillow rounds between the two directions
    assert torch.equal(got[:, :, 192:], got[:, :, 191:192].expand(-1, -1, 64))


def test_pieces_of_rows_are_exact(files: UpscaleFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    small = small_video(21, WIDTH, HEIGHT)
    whole = upscaled(files, small)
    monkeypatch.setattr(decoder, "CONDITIONAL", replace(decoder.CONDITIONAL, piece_pixels=256 * 20))
    assert int((upscaled(files, small).int() - whole.int()).abs().max()) <= 1


def test_the_share_of_blocks_is_the_published_one() -> None:
    """At 768 x 1280 each head attends twice as many pairs as a window has, less one."""
    assert WindowSettings(2.0).num_kept(60) == 2 * 60 * 60 - 1
    assert WindowSettings(2.0).num_kept(240) == 2 * 240 * 60 - 1  # and of larger frames as many for each block


@pytest.mark.parametrize("head_dim", [48, 128])
def test_gathered_blocks_are_masked_attention(head_dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 128 * n, 3, head_dim, generator=generator) for n in (3, 5, 5))
    keep = torch.rand(3, 3, 5, generator=generator) < 0.5
    keep[1, 2] = False
    mask = keep.repeat_interleave(128, 1).repeat_interleave(128, 2)
    scores = torch.einsum("qhd,khd->hqk", q[0], k[0]) * head_dim**-0.5
    shares = scores.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0)
    want = torch.einsum("hqk,khd->qhd", shares, v[0])[None]
    assert torch.allclose(GatheredBlocks().attend(q, k, v, keep), want, atol=1e-5)


def test_the_kernel_is_the_same() -> None:
    """Interpreted, in a process of its own, as the choice is made when Triton is imported."""
    code = (
        "from lowvram_video.attention.masked import GatheredBlocks; import torch\n"
        "from lowvram_video.attention.masked_select import _disagreement\n"
        "from lowvram_video.attention.masked_triton import TritonBlocks\n"
        "spec = torch.device('cpu'), torch.float32, 48\n"
        "assert _disagreement(TritonBlocks(), GatheredBlocks(), spec) is None\n"
    )
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- files ------------------------------------------------------------------------------------------------


def test_files_beside_the_model_are_found_by_what_they_are(tmp_path: Path) -> None:
    made = save_flashvsr(tmp_path, prefix="")
    assert files_of(made.model) == made
    moved = made.decoder.rename(tmp_path / "other.safetensors")
    assert files_of(made.model).decoder == moved
    moved.unlink()
    with pytest.raises(CheckpointError, match=r"no FlashVSR decoder beside it; expected TCDecoder\.safetensors"):
        files_of(made.model)


def test_a_model_with_the_projection_in_it(tmp_path: Path) -> None:
    made = save_flashvsr(tmp_path)
    both = {**load_file(made.model), **load_file(made.projection)}
    save_file(both, made.model, {"lowvram_video.num_heads": str(CONFIG.num_heads)})
    small = small_video(21)
    assert torch.equal(upscaled(replace(made, projection=made.model), small), upscaled(made, small))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"projection": "decoder"}, "expected FlashVSR's projection"),
        ({"decoder": "projection"}, "expected FlashVSR's decoder"),
        ({"prompt": "decoder"}, "no encoded prompt"),
        ({"model": "decoder"}, r"this is FlashVSR's decoder; .* load it with the FlashVSR loader"),
    ],
)
def test_files_that_are_taken_for_others(files: UpscaleFiles, wrong: dict[str, str], said: str) -> None:
    given = {name: getattr(files, other) for name, other in wrong.items()}
    with pytest.raises(CheckpointError, match=said):
        Upscaler(replace(files, **given), RunSettings())


def test_pickles_are_refused_with_the_way_out(files: UpscaleFiles, tmp_path: Path) -> None:
    pickle = tmp_path / "LQ_proj_in.ckpt"
    pickle.write_bytes(b"\x80\x02")
    with pytest.raises(CheckpointError, match=r"a PyTorch pickle.*convert it"):
        Upscaler(replace(files, projection=pickle), RunSettings())


def test_what_cannot_be_asked_for() -> None:
    for wrong in ({"scale": 5}, {"version": "2"}, {"colour": "red"}, {"sparse_ratio": -1.0}, {"kept_windows": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            replace(REQUEST, **wrong).check()  # type: ignore[arg-type]


def test_every_seed_of_comfyuis_makes_noise_of_its_own() -> None:
    """Those below 2**63 make what they made when there were no others."""
    for seed, step in ((0, 0), (7, 3), (2**63 - 1, 9)):
        assert window_seed(seed, step) == (seed + step * SEED_STEP) % 2**63
        assert window_seed(seed + 2**63, step) == window_seed(seed, step) + 2**63
        torch.Generator().manual_seed(window_seed(seed + 2**63, step))
    UpscaleRequest(seed=2**64 - 1).check()
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=f"seed is {seed}: use a whole number from 0 to {2**64 - 1}"):
            UpscaleRequest(seed=seed).check()
