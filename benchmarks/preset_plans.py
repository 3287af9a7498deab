"""Plans of typical works on cards of the usual sizes: python benchmarks/preset_plans.py"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowvram_video.memory.plan.footprint import GIB, Limits, WorkSize
from lowvram_video.memory.plan.plan import MemoryPlan, PlanError, plan_memory
from lowvram_video.memory.plan.table import describe
from lowvram_video.memory.plan.vae_footprint import VaeFootprint
from lowvram_video.wanvideo.footprint import WAN21_VAE, WAN22_VAE, WanFootprint

PRESET_BUDGETS_GIB = (6, 8, 12, 16, 24)
PRESET_RESERVE_BYTES = GIB // 2  # desktop and driver on a card of that size


@dataclass(frozen=True)
class Preset:
    """A typical work on a card of `card_gib`: its plan, or the refusal."""

    card_gib: int
    model: str
    work: WorkSize
    plan: MemoryPlan | None
    refusal: str | None


def preset_plans(cards_gib: Sequence[int] = PRESET_BUDGETS_GIB) -> tuple[Preset, ...]:
    """Plans of typical works on cards of the usual sizes, half a GiB of each left to the desktop."""
    video = WorkSize(81, 480, 832)
    fp8 = wan_footprint("Wan 14B fp8", 5120, 13824, 40, 40, 1.0)
    works = (
        (wan_footprint("Wan 1.3B bf16", 1536, 8960, 12, 30, 2.0), video),
        (
            wan_footprint("Wan TI2V 5B bf16", 3072, 14336, 24, 30, 2.0, 48, 48, WAN22_VAE),
            WorkSize(121, 704, 1280, stride=(4, 16, 16)),
        ),
        (wan_footprint("Wan 14B Q4_K", 5120, 13824, 40, 40, 0.5625), video),
        (fp8, video),
        (fp8, WorkSize(81, 720, 1280)),
    )
    presets = []
    for card in cards_gib:
        limits = Limits(card * GIB - PRESET_RESERVE_BYTES)
        for model, work in works:
            try:
                presets.append(Preset(card, model.name, work, plan_memory(model, work, limits), None))
            except PlanError as error:
                presets.append(Preset(card, model.name, work, None, str(error)))
    return tuple(presets)


def wan_footprint(
    name: str,
    dim: int,
    ffn_dim: int,
    num_heads: int,
    num_layers: int,
    bytes_per_weight: float,
    in_channels: int = 16,
    latent_channels: int = 16,
    vae: VaeFootprint | None = WAN21_VAE,
) -> WanFootprint:
    """A Wan text-to-video transformer of given dimensions whose linears take `bytes_per_weight` (Q4_K: 0.5625).

    For presets, tests and benchmarks: the footprint of a real run is computed from its checkpoint.
    """
    rest = 2 * (10 * dim + ffn_dim + 11 * dim)  # biases, norms and modulation, bf16
    block = int((8 * dim**2 + 2 * dim * ffn_dim) * bytes_per_weight) + rest
    attention, feed_forward = (int(2 * dim * width * bytes_per_weight) for width in (2 * dim, ffn_dim))
    embeddings = 4096 * dim + 256 * dim + 2 * dim**2 + 6 * dim**2 + 4 * (in_channels + latent_channels) * dim
    return WanFootprint(
        name=name,
        dim=dim,
        ffn_dim=ffn_dim,
        num_heads=num_heads,
        block_bytes=(block,) * num_layers,
        fixed_bytes=2 * (embeddings + 11 * dim),
        text_kv_bytes=int(2 * dim**2 * bytes_per_weight),
        transient_bytes=2 * embeddings - 8 * (in_channels + latent_channels) * dim,
        scratch_elements=0 if bytes_per_weight == 2 else max(3 * dim**2, dim * ffn_dim),
        in_channels=in_channels,
        latent_channels=latent_channels,
        streams_queries=True,
        stage_bytes=((attention, attention, feed_forward + rest),) * num_layers,
        vae=vae,
    )


if __name__ == "__main__":
    for preset in preset_plans():
        print(f"\n{preset.card_gib} GB\n{describe(preset.plan) if preset.plan else preset.refusal}")
