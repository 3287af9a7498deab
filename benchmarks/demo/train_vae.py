"""Trains the demo's VAE: Wan 2.1's architecture, narrow, with Wan's own latent statistics. Development only."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from torch.nn import functional

from .captions import all_captions
from .dataset import ClipSize, draw_scenes, render_clips

Log = Callable[[str], None]


NormSilu = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class VAETraining:
    """How the VAE is trained; errors on and near the object weigh `object_weight` times those elsewhere."""

    seconds: float = 330.0
    base_dim: int = 12
    learning_rate: float = 1.5e-3
    kl_weight: float = 1e-4
    object_weight: float = 10.0
    batch: int = 12


def new_vae(training: VAETraining) -> AutoencoderKLWan:
    return AutoencoderKLWan(base_dim=training.base_dim, z_dim=16, dim_mult=[1, 2, 4, 4])


def train_vae(
    vae: AutoencoderKLWan, training: VAETraining, size: ClipSize, device: torch.device, log: Log
) -> AutoencoderKLWan:
    """Minimises L1 + L2 + a little KL for `training.seconds`, then gives the latents Wan's statistics."""
    vae = vae.to(device).train().requires_grad_(True)
    for parameter in vae.parameters():
        if parameter.dim() == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    _undo_statistics(vae)
    generator = torch.Generator().manual_seed(1)
    with (
        torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True),
        torch._dynamo.config.patch(recompile_limit=64),  # a kernel for each resolution and width
    ):
        _optimise(vae, training, size, generator, log)
    vae.eval().requires_grad_(False)
    batches = [_batch(training, size, generator, device) for _ in range(16)]
    _take_wan_statistics(vae, batches)
    clips = batches[0]
    mean, _ = encode_whole_clips(vae, clips).chunk(2, dim=1)
    whole = decode_whole_clips(vae, mean).clamp(-1, 1)
    psnr = 10 * math.log10(4 / (whole - clips).square().mean().item())
    log(f"vae done: L1 {(whole - clips).abs().mean().item():.4f}, PSNR {psnr:.1f} dB")
    chunked = vae.decode(vae.encode(clips[:2]).latent_dist.mean).sample
    log(f"vae frame by frame against whole clips: {(chunked - whole[:2]).abs().max().item():.1e}")
    return vae


def _optimise(
    vae: AutoencoderKLWan, training: VAETraining, size: ClipSize, generator: torch.Generator, log: Log
) -> None:
    torch.manual_seed(0)
    norm_silu = torch.compile(_norm_silu, dynamic=False) if vae.device.type == "cuda" else _norm_silu
    optimizer = torch.optim.AdamW(
        vae.parameters(), training.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=True
    )
    began, logged, step = time.perf_counter(), 0.0, 0
    while (elapsed := time.perf_counter() - began) < training.seconds:
        set_learning_rate(optimizer, training.learning_rate, elapsed / training.seconds, step, num_warmup=100)
        clips = _batch(training, size, generator, vae.device)
        l1, l2, kl = _losses(vae, clips, training.object_weight, norm_silu)
        optimizer.zero_grad(set_to_none=True)
        (l1 + l2 + training.kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if elapsed - logged > 5:
            logged = elapsed
            log(f"vae {elapsed:5.0f} s  step {step:5d}  weighted L1 {l1.item():.4f}  KL {kl.item():.3f}")


def _losses(
    vae: AutoencoderKLWan, clips: Tensor, object_weight: float, norm_silu: NormSilu
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted mean absolute error, the same squared, and Kullback-Leibler divergence per latent value."""
    chroma = clips.amax(1, keepdim=True) - clips.amin(1, keepdim=True)
    near = functional.max_pool3d((chroma > 0.4).float(), (1, 9, 9), stride=1, padding=(0, 4, 4))
    weight = 1 + (object_weight - 1) * near
    weight = weight / weight.mean()
    with torch.autocast(clips.device.type, torch.bfloat16, enabled=clips.is_cuda):
        mean, log_variance = encode_whole_clips(vae, clips, norm_silu).float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 10)
        latent = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        error = decode_whole_clips(vae, latent, norm_silu).float() - clips
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return (weight * error.abs()).mean(), (weight * error.square()).mean(), kl


def set_learning_rate(
    optimizer: torch.optim.Optimizer, peak: float, progress: float, step: int, num_warmup: int
) -> None:
    """Linear warm-up over steps, then a cosine to zero over the share `progress` of the time."""
    rate = peak * min(1.0, (step + 1) / num_warmup) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    for group in optimizer.param_groups:
        group["lr"] = rate


def _batch(training: VAETraining, size: ClipSize, generator: torch.Generator, device: torch.device) -> Tensor:
    """Clips in -1..1, [B, 3, T, H, W]."""
    captions = all_captions()
    index = torch.randint(len(captions), (training.batch,), generator=generator)
    scenes = draw_scenes([captions[i] for i in index], generator)
    return render_clips(scenes.to(device), size) * 2 - 1


def _take_wan_statistics(vae: AutoencoderKLWan, batches: list[Tensor]) -> None:
    """Gives the latents Wan's mean and deviation per channel.

    Wan's constants then normalise these latents too, and the VAE is interchangeable with Wan's own in any program.
    """
    means = torch.cat([encode_whole_clips(vae, clips).chunk(2, dim=1)[0] for clips in batches])
    mean, deviation = means.mean((0, 2, 3, 4)), means.std((0, 2, 3, 4))
    wan_mean = torch.tensor(vae.config.latents_mean, device=mean.device)
    wan_deviation = torch.tensor(vae.config.latents_std, device=mean.device)
    scale = wan_deviation / deviation
    _transform_latents(vae, scale, wan_mean - scale * mean)


def _undo_statistics(vae: AutoencoderKLWan) -> None:
    """Before training goes on: normal latents again, around which the KL pulls."""
    deviation = torch.tensor(vae.config.latents_std, device=vae.device)
    mean = torch.tensor(vae.config.latents_mean, device=vae.device)
    _transform_latents(vae, 1 / deviation, -mean / deviation)


@torch.no_grad()
def _transform_latents(vae: AutoencoderKLWan, scale: Tensor, shift: Tensor) -> None:
    """Latents become `scale * latent + shift`, by the 1x1x1 convolutions on either side; clips stay the same."""
    num = len(scale)
    encode, decode = vae.quant_conv, vae.post_quant_conv
    encode.weight[:num] *= scale[:, None, None, None, None]
    encode.bias[:num] = encode.bias[:num] * scale + shift
    encode.bias[num:] += 2 * scale.log()
    decode.weight /= scale[:, None, None, None]
    decode.bias -= decode.weight.flatten(1) @ shift


# --- the same network over whole clips: five times fewer kernels than frame by frame ----------------------


def _norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """`WanRMS_norm` and SiLU in one function, which torch.compile makes one kernel."""
    inverse_length = x.float().square().sum(1, keepdim=True).clamp_min(1e-24).rsqrt()
    return functional.silu(x.float() * inverse_length * (x.shape[1] ** 0.5 * gamma)).to(x.dtype)


def encode_whole_clips(vae: AutoencoderKLWan, clips: Tensor, norm_silu: NormSilu = _norm_silu) -> Tensor:
    """What `vae._encode` computes chunk by chunk, at once: [B, 2 * z, t, h, w], mean and log variance."""
    encoder = vae.encoder
    x = encoder.conv_in(clips)
    for layer in encoder.down_blocks:
        if hasattr(layer, "conv1"):
            x = _residual(layer, x, norm_silu)
            continue
        x = layer(x)
        if layer.mode == "downsample3d":
            # The first frame passes as it is; each later output sees three frames, in steps of two.
            x = torch.cat((x[:, :, :1], layer.time_conv(x)), dim=2)
    x = _middle(encoder.mid_block, x, norm_silu)
    return vae.quant_conv(encoder.conv_out(norm_silu(x, encoder.norm_out.gamma)))


def decode_whole_clips(vae: AutoencoderKLWan, latent: Tensor, norm_silu: NormSilu = _norm_silu) -> Tensor:
    """What `vae._decode` computes frame by frame, at once and without the clamp: [B, 3, T, H, W]."""
    decoder = vae.decoder
    x = _middle(decoder.mid_block, decoder.conv_in(vae.post_quant_conv(latent)), norm_silu)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = _residual(resnet, x, norm_silu)
        for upsampler in block.upsamplers or ():
            if upsampler.mode == "upsample3d":
                # The first frame passes as it is and is not seen by the others' convolution.
                pairs = upsampler.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))
                x = torch.cat((x[:, :, :1], pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)), dim=2)
            x = upsampler(x)
    return decoder.conv_out(norm_silu(x, decoder.norm_out.gamma))


def _residual(block: nn.Module, x: Tensor, norm_silu: NormSilu) -> Tensor:
    hidden = block.conv1(norm_silu(x, block.norm1.gamma))
    return block.conv_shortcut(x) + block.conv2(norm_silu(hidden, block.norm2.gamma))


def _middle(block: nn.Module, x: Tensor, norm_silu: NormSilu) -> Tensor:
    x = block.attentions[0](_residual(block.resnets[0], x, norm_silu))
    return _residual(block.resnets[1], x, norm_silu)
