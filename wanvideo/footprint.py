"""What a Wan transformer, a pass of it and Wan's VAEs cost, for the memory planner."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..memory.plan.footprint import Choice, Limits, ModelFootprint, WorkSize
from ..memory.plan.vae_footprint import VaeFootprint
from .network.config import WanConfig

# bf16. Three frames are held per causal convolution: 3,546 elements per pixel, which is 2.64 GiB at 480x832 and 6.09
# GiB at 720x1280. What strips take and leave is held against the layers' own arithmetic by a test. At work: of one
# frame, three tensors of 96 channels or an enlarged one of 192, and finished frames on their way. Decoders alone,
# with their smallest kernels in the order of each frame.
WAN21_VAE = VaeFootprint(157 * 10**6, 2 * 3546, 1400, 88_000, 26_900, 768, 360)
# Its decoder works on 2x2-folded pixels, 256 channels wide, with a 512-channel input to the last stage.
WAN22_VAE = VaeFootprint(1111 * 10**6, 2 * 2678, 1500, 163_000, 61_856, 2048, 100)
# The same files' encoders, alone as well.
WAN21_ENCODER = VaeFootprint(118 * 10**6, 4160, 1000, 119_100, 16_300, 768, 218)
WAN22_ENCODER = VaeFootprint(300 * 10**6, 1800, 1500, 100_000, 19_300, 1280, 147)


@dataclass(frozen=True)
class WanWork(WorkSize):
    """`controls` is how many control videos steer a model that takes such (VACE).

    `nag`: a negative prompt guides attention to the text. A step cache keeps `residuals` on the device, each of a
    sample's tokens. `seen_queries`: something is shown the queries of self-attention beside what attention made of
    them.
    """

    controls: int = 1
    nag: bool = False
    residuals: int = 0
    seen_queries: bool = field(default=False, kw_only=True)

    @property
    def residual_count(self) -> int:
        """How many a step cache has where every pass of a step has its own."""
        return self.batch * max(1, self.passes_per_step - self.nag)

    def covers(self, other: WanWork) -> bool:
        """Whether whoever planned for this has room for all that steers `other`."""
        flags = ("nag", "seen_queries", "all_queries")
        return self.controls >= other.controls and all(getattr(self, flag) >= getattr(other, flag) for flag in flags)


def wan_work(
    config: WanConfig, size: tuple[int, int, int], batch: int = 1, passes_per_step: int = 1, controls: int = 1
) -> WanWork:
    """The work of a video of `size` (width, height, frames)."""
    width, height, frames = size
    stride = (4, 16, 16) if config.out_channels == 48 else (4, 8, 8)
    return WanWork(frames, height, width, batch, passes_per_step, stride, config.patch_size, controls)


def with_residuals(work: WorkSize, on_device: bool) -> WorkSize:
    """The same work with those of a step cache, on the device or not."""
    return replace(work, residuals=work.residual_count if on_device else 0) if isinstance(work, WanWork) else work


@dataclass(frozen=True)
class WanFootprint(ModelFootprint):
    """`control_streams` are token-sized tensors beside `x` for each control video (VACE), `ray_channels` numbers of an
    input per latent position beside the latent (camera)."""

    control_streams: int = 0
    ray_channels: int = 0

    def activation_bytes(self, work: WorkSize, choice: Choice, limits: Limits) -> int:
        controls, residuals = (work.controls, work.residuals) if isinstance(work, WanWork) else (1, 0)
        streams = (controls * self.control_streams * work.rows + residuals * work.tokens) * self.dim
        rays = work.batch * work.latent_positions * self.ray_channels
        return super().activation_bytes(work, choice, limits) + (streams + rays) * self.compute_bytes

    def temporary_bytes(self, work: WorkSize, choice: Choice, limits: Limits) -> int:
        """The adapter's convolution is over 3 x 3 positions: its weight cast, and as cuDNN lays it out."""
        adapter = 2 * 9 * self.dim**2 * self.compute_bytes if self.ray_channels else 0
        # tokens that others are added to are made before each of several cards has its own
        whole = work.cards * work.rows * self.dim * self.compute_bytes if self.ray_channels and work.cards > 1 else 0
        guided = self._guided_bytes(work, choice, limits) if isinstance(work, WanWork) and work.nag else 0
        return max(adapter + whole, guided, super().temporary_bytes(work, choice, limits))

    def key_length(self, work: WorkSize) -> int:
        return 0 if work.all_queries else work.tokens  # others' attention may not spare what ours does

    def _attention_bytes(self, work: WorkSize, choice: Choice, limits: Limits) -> int:
        seen = work.rows * self.dim * self.compute_bytes if isinstance(work, WanWork) and work.seen_queries else 0
        return seen + super()._attention_bytes(work, choice, limits)

    def _guided_bytes(self, work: WorkSize, choice: Choice, limits: Limits) -> int:
        """Attention to a prompt and to a negative one, then to pictures in its place.

        In groups of heads, and on several cards, attention replaces its queries: those for others are copies, one of
        them in keys' bytes.
        """
        queries, grouped = choice.query_rows(work), choice.head_groups > 1 or work.cards > 1
        kept = int(choice.packed_keys) + int(self.image_tokens > 0) if grouped else 2
        rows = queries * self.dim * self.compute_bytes
        output = -(-rows // choice.head_groups) if grouped else 0
        workspace = self._attention_workspace(queries, work.batch * self.context_tokens, limits, choice.head_groups)
        return kept * rows + output + workspace

    def _text_projection_bytes(self, work: WorkSize) -> int:
        """Those of a negative prompt too, which are made beside the prompt's."""
        guided = isinstance(work, WanWork) and work.nag
        more = self.text_tokens * self.dim * (2 * 4 + 2 * self.compute_bytes) if guided else 0
        return super()._text_projection_bytes(work) + more
