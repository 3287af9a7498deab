"""What a denoising pass takes of VRAM, line by line of the plan's table; arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass

from .footprint import Choice, Limits, ModelFootprint, WorkSize
from .slack import slack_bytes

# Pages of pinned memory have entries in the device's tables: 8 bytes for each of 4 KiB; measured.
PINNED_BYTES_PER_ENTRY_BYTE = 512


@dataclass(frozen=True)
class WeightBytes:
    """Where the blocks' bytes are: those that stay on the device, the ring for the others, what of them is pinned."""

    residents: int
    ring: int
    pinned: int


@dataclass(frozen=True)
class DenoiseMemory:
    """Bytes of VRAM while denoising, one field per line of the plan's table."""

    context: int  # CUDA context, libraries' code and memory of their own, tables of pinned memory
    fixed_weights: int
    residents: int
    ring: int
    activations: int  # x, q, k, v, attention and chunk temporaries, rotary angles
    scratch: int  # weights unpacked to the compute dtype
    text: int  # embedded prompt and, where cached, its keys and values
    latents: int
    slack: int  # allocator rounding and fragmentation

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def holding(self, weights: WeightBytes) -> DenoiseMemory:
        """The same pass with the blocks' bytes where these say."""
        entries = weights.pinned // PINNED_BYTES_PER_ENTRY_BYTE if self.context else 0
        # by its fields: thousands are made in a search, and `replace` takes ten times as long
        return DenoiseMemory(
            self.context + entries, self.fixed_weights, weights.residents, weights.ring, self.activations, self.scratch,
            self.text, self.latents, self.slack,
        )  # fmt: skip


def denoise_memory(model: ModelFootprint, work: WorkSize, choice: Choice, limits: Limits) -> DenoiseMemory:
    """Predicted VRAM of a denoising pass, beside its blocks."""
    activations = model.activation_bytes(work, choice, limits)
    scratch = model.scratch_elements * model.compute_bytes
    text = model.text_bytes(work, choice)
    channels = 10 * model.latent_channels + max(0, model.in_channels - model.latent_channels)
    latents = 4 * work.batch * work.latent_positions * channels  # fp32, of solver, guidance and preview
    return DenoiseMemory(
        context=limits.context_bytes,
        fixed_weights=model.fixed_bytes - (model.transient_bytes if choice.transient_fixed else 0),
        residents=0,
        ring=0,
        activations=activations,
        scratch=scratch,
        text=text,
        latents=latents,
        slack=slack_bytes(activations + scratch + text + latents, work.cards),
    )
