"""Trains the demo model in the real file formats. Development only: needs diffusers and transformers.

    python -m lowvram_video.benchmarks.demo.train --out DIR --compile       about 9 minutes on an H200
    python -m lowvram_video.benchmarks.demo.train --out DIR --smoke         every phase for seconds, on a CPU
    python -m lowvram_video.benchmarks.demo.train --out DIR --init EARLIER  trains on from an earlier run's files
    python -m lowvram_video.benchmarks.demo.train --out DIR --init demo --vae-seconds 0 --long
                                                                            its sibling of 10,300 tokens, 4 minutes

A VAE of Wan 2.1's architecture first; then a UMT5 encoder and a Wan transformer together, by flow matching
(Lipman et al. 2023, arXiv:2210.02747) with Wan's shifted timesteps and prompts dropped for guidance
(Ho & Salimans 2022, arXiv:2207.12598).

The files of demo/ were made on one H200 in two runs, the second with --init and the default times; the first
spent 150 s on the VAE, not yet with `object_weight`, and 270 s on the transformer.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from lowvram_video.wanvideo.checkpoint import official_names
from lowvram_video.wanvideo.text.tokenizer import Tokenizer
from lowvram_video.wanvideo.vae.checkpoint import to_official_names
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from .captions import Caption, all_captions
from .dataset import ClipSize, draw_scenes, render_clips
from .score import judge, pick_captions, table
from .train_text import MAX_PROMPT_TOKENS, PhraseTable, encode_text, train_tokenizer
from .train_vae import VAETraining, encode_whole_clips, new_vae, set_learning_rate, train_vae

Module = TypeVar("Module", bound=nn.Module)

DIT_FILE = "wan2.1_t2v_demo.safetensors"
VAE_FILE = "wan_2.1_vae_demo.safetensors"
TEXT_FILE = "umt5_demo_enc.safetensors"
POOL_PIXELS = 150_000_000  # drawn and encoded at a time


@dataclass(frozen=True)
class DiTTraining:
    """How the transformer and the text encoder are trained; with `init` only shortly warmed up."""

    pool_seconds: float = 25.0
    max_pool: int = 40_000
    seconds: float = 160.0
    num_warmup: int = 500
    dim: int = 256
    ffn_dim: int = 768
    num_layers: int = 4
    text_dim: int = 128
    batch: int = 256
    learning_rate: float = 1e-3
    shift: float = 3.0
    dropout: float = 0.12
    ema: float = 0.999
    compile: bool = False


@dataclass(frozen=True)
class Stage:
    """Clips of one size, and how the transformer is trained on them."""

    size: ClipSize
    training: DiTTraining

    @property
    def tokens(self) -> int:
        return ((self.size.num_frames - 1) // 4 + 1) * (self.size.height // 16) * (self.size.width // 16)


def long_stages(training: DiTTraining) -> list[Stage]:
    """From the demo model's size to 10,300 tokens: alike at first, then longer. More tokens show more of what is under
    the noise, so the noise is stronger (Esser et al. 2024, arXiv:2403.03206, section 5.3.2)."""
    training = replace(training, learning_rate=6e-4, num_warmup=50)
    return [
        Stage(ClipSize(33, 128, 128), replace(training, pool_seconds=5, seconds=25, batch=128, shift=4.0)),
        Stage(ClipSize(129, 160, 160), replace(training, pool_seconds=8, seconds=40, batch=32, shift=7.0)),
        Stage(ClipSize(409, 160, 160), replace(training, pool_seconds=16, seconds=75, batch=12, shift=10.0)),
    ]


def main() -> None:
    options = _parser().parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    size = ClipSize(17, options.size, options.size)
    vae_training = VAETraining(seconds=options.vae_seconds, base_dim=options.vae_dim)
    training = DiTTraining(
        pool_seconds=options.pool_seconds,
        seconds=options.dit_seconds,
        num_layers=options.layers,
        batch=options.batch,
        learning_rate=options.learning_rate,
        compile=options.compile,
    )
    num_scored = 128
    if options.smoke:
        size = ClipSize(9, 48, 48)
        vae_training = replace(vae_training, seconds=min(6, options.vae_seconds), batch=2)
        training = replace(training, pool_seconds=2, seconds=6, batch=4)
        num_scored = 4
    stages = [Stage(size, training)]
    if options.long:
        stages, num_scored = long_stages(training), 16
        if options.smoke:
            stages = [
                Stage(ClipSize(9 + 4 * k, 48, 48), replace(each.training, pool_seconds=2, seconds=4, batch=4))
                for k, each in enumerate(stages)
            ]

    torch.manual_seed(0)
    spiece = train_tokenizer()
    phrases = PhraseTable.build(Tokenizer.from_bytes(spiece, MAX_PROMPT_TOKENS), device)
    vae, models = new_vae(vae_training), Models(training, phrases.vocab_size)
    if options.init is not None:
        load_earlier(options.init, vae, models)
    if vae_training.seconds > 0:
        vae = train_vae(vae, vae_training, size, device, log)
    vae = rounded(vae.to(device).eval().requires_grad_(False), torch.float16)
    save_vae(vae, options.out, vae_training)
    models = models.to(device)
    for stage in stages:
        log(f"clips of {stage.size.num_frames} x {stage.size.height} x {stage.size.width}, {stage.tokens} tokens")
        latents, captions = encode_pool(vae, stage.training, stage.size, device)
        models = train_dit(models, stage.training, phrases, spiece, latents, captions, options.out)
        models = models.train().requires_grad_(True)
    models.eval().requires_grad_(False)
    evaluate(models, vae, spiece, stages[-1], num_scored, options.out)


def log(message: str) -> None:
    print(message, flush=True)


# --- latents ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def encode_pool(
    vae: AutoencoderKLWan, training: DiTTraining, size: ClipSize, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Draws and encodes clips for `pool_seconds`: normalised latents [N, 16, t, h, w], caption indices [N]."""
    mean, deviation = latent_statistics(vae)
    known, generator = all_captions(), torch.Generator().manual_seed(2)
    latents, captions, began = [], [], time.perf_counter()
    pixels = size.num_frames * size.height * size.width
    batch = max(1, min(64, POOL_PIXELS // pixels)) if device.type == "cuda" else 4
    while time.perf_counter() - began < training.pool_seconds and batch * len(latents) < training.max_pool:
        index = torch.randint(len(known), (batch,), generator=generator)
        clips = render_clips(draw_scenes([known[i] for i in index], generator).to(device), size) * 2 - 1
        with torch.autocast(device.type, torch.bfloat16, enabled=clips.is_cuda):
            moments = encode_whole_clips(vae, clips)
        latents.append(((moments[:, :16].float() - mean) / deviation).half())
        captions.append(index.to(device))
        if device.type == "cuda":
            torch.cuda.synchronize()
    pool = torch.cat(latents)
    log(f"pool: {len(pool)} clips, latents {tuple(pool.shape[1:])}, deviation {pool.float().std().item():.3f}")
    return pool, torch.cat(captions)


def latent_statistics(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    def per_channel(values: list[float]) -> Tensor:
        return torch.tensor(values, device=vae.device).view(1, -1, 1, 1, 1)

    return per_channel(vae.config.latents_mean), per_channel(vae.config.latents_std)


# --- transformer -----------------------------------------------------------------------------------------


class Models(nn.Module):
    """The two networks that are trained together."""

    def __init__(self, training: DiTTraining, vocab_size: int) -> None:
        super().__init__()
        self.text = UMT5EncoderModel(
            UMT5Config(
                vocab_size=vocab_size,
                d_model=training.text_dim,
                d_kv=64,
                d_ff=2 * training.text_dim,
                num_layers=2,
                num_heads=2,
                dropout_rate=0.0,
            )
        )
        self.dit = WanTransformer3DModel(
            num_attention_heads=training.dim // 128,
            attention_head_dim=128,
            text_dim=training.text_dim,
            ffn_dim=training.ffn_dim,
            num_layers=training.num_layers,
        )
        nn.init.zeros_(self.dit.proj_out.weight)


def train_dit(
    models: Models,
    training: DiTTraining,
    phrases: PhraseTable,
    spiece: bytes,
    latents: Tensor,
    captions: Tensor,
    out: Path,
) -> Models:
    """Flow matching for `training.seconds`; returns the moving average of the weights, rounded as it is saved."""
    torch.manual_seed(0)
    device = latents.device
    average = copy.deepcopy(models).requires_grad_(False)
    num = {name: sum(p.numel() for p in part.parameters()) for name, part in models.named_children()}
    log(f"parameters: {num}; vocabulary {phrases.vocab_size}, longest prompt {phrases.ids.shape[1]} tokens")
    if training.compile:
        models.dit.compile_repeated_blocks(dynamic=False)
    optimizer = torch.optim.AdamW(
        models.parameters(), training.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    began, logged, saved, step = time.perf_counter(), 0.0, 0.0, 0
    recent = torch.zeros((), device=device)
    for row in _rows(len(latents), training.batch, device):
        elapsed = time.perf_counter() - began
        if elapsed > training.seconds:
            break
        set_learning_rate(optimizer, training.learning_rate, elapsed / training.seconds, step, training.num_warmup)
        loss = _flow_loss(models, training, latents[row].float(), *phrases.draw(captions[row], training.dropout))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        optimizer.step()
        decay = min(training.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(models.parameters()), 1 - decay)
        recent = torch.lerp(recent, loss.detach(), 1.0 if step == 0 else 0.02)
        step += 1
        if elapsed - logged > 5:
            logged = elapsed
            log(f"dit {elapsed:5.0f} s  step {step:6d}  loss {recent.item():.4f}")
        if elapsed - saved > 60:
            saved = elapsed
            save_models(average, spiece, out, training, step)
    log(f"dit done after {step} steps ({step * training.batch} clips): loss {recent.item():.4f}")
    average = rounded(average.eval(), torch.float16)
    save_models(average, spiece, out, training, step)
    return average


def _rows(num: int, batch: int, device: torch.device) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(num, device=device).split(min(batch, num))[: max(num // batch, 1)]


def _flow_loss(models: Models, training: DiTTraining, clean: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of the velocity noise - clean at x = (1 - sigma) clean + sigma noise."""
    uniform = torch.rand(len(clean), device=clean.device)
    sigma = training.shift * uniform / (1 + (training.shift - 1) * uniform)
    noise = torch.randn_like(clean)
    noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1))
    context = encode_text(models.text, ids, mask)
    with torch.autocast(clean.device.type, torch.bfloat16):
        velocity = models.dit(noisy, sigma * 1000, context, return_dict=False)[0]
    return (velocity.float() - (noise - clean)).square().mean()


# --- files -----------------------------------------------------------------------------------------------


def rounded(module: Module, dtype: torch.dtype) -> Module:
    """A copy whose weights are those that the saved file will hold."""
    module = copy.deepcopy(module)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return module


def save_vae(vae: AutoencoderKLWan, out: Path, training: VAETraining) -> None:
    state = vae.state_dict()
    names = to_official_names(state)
    _save({names[old]: tensor for old, tensor in state.items()}, out / VAE_FILE, training)


def save_models(models: Models, spiece: bytes, out: Path, training: DiTTraining, num_steps: int) -> None:
    state = models.dit.state_dict()
    names = official_names(state)
    how = f"{training}, {num_steps} steps"
    _save({names[old]: t for old, t in state.items()}, out / DIT_FILE, how)
    text = {name: t for name, t in models.text.state_dict().items() if name != "encoder.embed_tokens.weight"}
    tokenizer = {"spiece_model": torch.frombuffer(bytearray(spiece), dtype=torch.uint8)}
    _save({**text, **tokenizer}, out / TEXT_FILE, how)


def load_earlier(folder: Path, vae: AutoencoderKLWan, models: Models) -> None:
    """Fills the three networks from the files of an earlier run."""
    text_names = {name: name for name in models.text.state_dict() if name != "encoder.embed_tokens.weight"}
    _load(vae, to_official_names(vae.state_dict()), folder / VAE_FILE)
    _load(models.dit, official_names(models.dit.state_dict()), folder / DIT_FILE)
    _load(models.text, text_names, folder / TEXT_FILE)


def _load(module: nn.Module, names: Mapping[str, str], path: Path) -> None:
    stored = load_file(path)
    own = module.state_dict()
    for name, official in names.items():
        own[name].copy_(stored[official])


def _save(tensors: dict[str, Tensor], path: Path, how: object) -> None:
    metadata = {
        "format": "pt",
        "title": "tiny demo model of ComfyUI-LowVRAM-Video in Wan 2.1's format, not a Wan model",
        "prompts": "a red ball moves slowly left at night (6 colours, 3 shapes, 4 directions, 3 speeds, 3 places)",
        "trained_by": f"benchmarks/demo/train.py: {how}",
        "license": "Apache-2.0",
    }
    stored = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in tensors.items()
    }
    save_file(stored, path, metadata)


# --- what it learned -------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(models: Models, vae: AutoencoderKLWan, spiece: bytes, stage: Stage, num_scored: int, out: Path) -> None:
    """Scores reconstructions and samples at a few settings; writes a contact sheet of both."""
    captions, size, shift = pick_captions(num_scored), stage.size, stage.training.shift
    drawn = render_clips(draw_scenes(captions, torch.Generator().manual_seed(9)).to(vae.device), size)
    per_call = max(1, POOL_PIXELS // drawn[0].numel())
    rebuilt = torch.cat([_decode(vae, vae.encode(part * 2 - 1).latent_dist.mean) for part in drawn.split(per_call)])
    log(f"reconstructions:\n{table(_judge_all(rebuilt, captions))}")
    shape = vae.encode(drawn[:1] * 2 - 1).latent_dist.mean.shape[1:]
    sheets = []
    ways = ((4.0, shift, 20), (1.0, shift, 20), (6.0, shift + 2, 20), (4.0, shift, 12))
    for guidance, shift, num_steps in ways[: 4 if stage.tokens < 1000 else 1]:
        latents = _sample(models, vae, spiece, captions, shape, guidance, shift, num_steps)
        frames = torch.cat([_decode(vae, part) for part in latents.split(per_call)])
        log(f"samples: guidance {guidance}, shift {shift}, {num_steps} Euler steps")
        log(table(_judge_all(frames, captions)))
        sheets.append(frames)
    step = max(1, size.num_frames // 9)
    rows = [*drawn[:4].permute(0, 2, 3, 4, 1), *rebuilt[:4], *sheets[0][:16]]
    _contact_sheet([row[::step] for row in rows], out / "contact_sheet.png")


def _decode(vae: AutoencoderKLWan, latent: Tensor) -> Tensor:
    """[N, T, H, W, 3] in 0..1"""
    return vae.decode(latent).sample.permute(0, 2, 3, 4, 1) / 2 + 0.5


def _judge_all(clips: Tensor, captions: list[Caption]) -> list:
    return [judge(clip.cpu(), caption) for clip, caption in zip(clips, captions, strict=True)]


def _sample(
    models: Models,
    vae: AutoencoderKLWan,
    spiece: bytes,
    captions: list[Caption],
    shape: torch.Size,
    guidance: float,
    shift: float,
    num_steps: int,
) -> Tensor:
    """Euler steps down the shifted schedule with classifier-free guidance; the latents the VAE takes."""
    tokenizer = Tokenizer.from_bytes(spiece, MAX_PROMPT_TOKENS)
    prompts = [caption.text for caption in captions] + [""] * len(captions)
    context = encode_text(models.text, *(tensor.to(vae.device) for tensor in tokenizer.encode(prompts)))
    latent = torch.randn(len(captions), *shape, generator=torch.Generator().manual_seed(3)).to(vae.device)
    uniform = torch.linspace(1, 0, num_steps + 1, device=vae.device)
    sigmas = shift * uniform / (1 + (shift - 1) * uniform)
    for sigma, following in pairwise(sigmas):
        timestep = (sigma * 1000).expand(2 * len(captions))
        with torch.autocast(vae.device.type, torch.bfloat16, enabled=vae.device.type == "cuda"):
            both = models.dit(latent.repeat(2, 1, 1, 1, 1), timestep, context, return_dict=False)[0].float()
        cond, uncond = both.chunk(2)
        latent = latent + (following - sigma) * (uncond + guidance * (cond - uncond))
    mean, deviation = latent_statistics(vae)
    return latent * deviation + mean


def _contact_sheet(clips: list[Tensor], path: Path) -> None:
    """One row per clip."""
    rows = [torch.cat(list(clip), dim=1) for clip in clips]
    pixels = (torch.cat(rows).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    Image.fromarray(np.asarray(pixels)).save(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the three files and the contact sheet")
    parser.add_argument("--size", type=int, default=96, help="height and width of the clips")
    parser.add_argument("--init", type=Path, help="folder of an earlier run's three files, to train on from there")
    parser.add_argument("--vae-seconds", type=float, default=330)
    parser.add_argument("--vae-dim", type=int, default=12)
    parser.add_argument("--pool-seconds", type=float, default=25)
    parser.add_argument("--dit-seconds", type=float, default=160)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks")
    parser.add_argument("--long", action="store_true", help="train on to clips of 10,300 tokens, by stages")
    parser.add_argument("--smoke", action="store_true", help="every phase for a few seconds, at a reduced size")
    return parser


if __name__ == "__main__":
    main()
