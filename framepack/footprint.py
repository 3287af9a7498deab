"""What a FramePack transformer and one of its sections cost, for the memory planner."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from ..memory.plan.footprint import Choice, Limits, ModelFootprint, WorkSize
from .network.config import IMAGE_TOKENS

TWICE_FRAMES, FOUR_FRAMES = 2, 16  # latents of the history that are shown at half and at a quarter of the size
TEXT_TOKENS = 512  # at most
DOUBLE_PASSES, SINGLE_PASSES = 16, 19  # see BLOCK_PASSES


@dataclass(frozen=True)
class SectionSize(WorkSize):
    """One section: `frames` that are made at once (4 w - 3), beside `clean_frames` and the shrunken history.

    `step_cache` keeps two more token-sized tensors for each pass of a step: what the last step's signal was, and what
    its blocks added. `nag` shows every pass a negative prompt too.
    """

    clean_frames: int = 3  # start, the nearest neighbour, the end
    with_history: bool = True
    context_tokens: int = TEXT_TOKENS + IMAGE_TOKENS
    step_cache: bool = True
    nag: bool = False

    @property
    def noisy_tokens(self) -> int:
        """Tokens of the latents that are made."""
        return self._grid(self.latent_size[0], (1, 2, 2))

    @cached_property
    def tokens(self) -> int:
        history = self._grid(TWICE_FRAMES, (2, 4, 4)) + self._grid(FOUR_FRAMES, (4, 8, 8))
        shown = self._grid(self.clean_frames, (1, 2, 2)) + (history if self.with_history else 0)
        return self.noisy_tokens + shown + (1 + self.nag) * self.context_tokens

    def _grid(self, frames: int, kernel: tuple[int, int, int]) -> int:
        size = (frames, *self.latent_size[1:])
        return math.prod(-(-length // step) for length, step in zip(size, kernel, strict=True))

    def advice(self, frames: int) -> str:
        return f"use a latent_window_size of at most {(frames - 1) // self.stride[0] + 1}"

    def __str__(self) -> str:
        cards = f", on {self.cards} cards" if self.cards > 1 else ""
        return f"{self.width}x{self.height}, sections of {self.frames} frames{cards}"


@dataclass(frozen=True)
class FramePackFootprint(ModelFootprint):
    """`ffn_dim` is the MLP's width; `num_double` of the blocks have weights of their own for image and text.

    `norms_once`: single blocks keep what they normed for attention, for the MLP, where the pool has room.
    """

    num_double: int = 0
    norms_once: bool = False

    def activation_bytes(self, work: WorkSize, choice: Choice, limits: Limits) -> int:
        """As Wan's, and what a step cache keeps."""
        cached_steps = isinstance(work, SectionSize) and work.step_cache
        kept = 1 + work.cards  # what blocks added to a card's rows, and the signal of all
        cached = kept * work.passes_per_step * self._token_bytes(work) if cached_steps else 0
        return super().activation_bytes(work, choice, limits) + cached

    def pool_bytes(self, work: WorkSize, choice: Choice) -> int:
        """As Wan's; a single block's hidden rows, of attention and MLP together, lie in the bytes of k and v."""
        joined = min(choice.token_chunk, work.rows) * (self.dim + self.ffn_dim) * self.compute_bytes
        return max(super().pool_bytes(work, choice), self._token_bytes(work) + joined)

    def temporary_bytes(self, work: WorkSize, choice: Choice, limits: Limits) -> int:
        """What attention made stays while a single block's MLP norms its rows and widens them, and makes its output.

        Where products quantise whole rows, or LoRAs run beside them, the widened ones come by a tensor twice as wide as
        the norms. Several cards make all tokens, and the step cache's signal of all, before each has its own.
        """
        whole = work.cards * self._token_bytes(work) if work.cards > 1 else 0
        chunk, row = min(choice.token_chunk, work.rows), self.dim * self.compute_bytes
        widened, made = max(self._normed_bytes(limits), 3 * row if self.row_bytes else row), row
        if self._keeps_normed(work, choice):  # and what is made comes into q's bytes
            widened, made = 2 * row if self.row_bytes else 0, 0
        joined = chunk * max(widened + self.key_row_bytes, made + self.row_bytes) + self.product_bytes
        attended = self._attended_bytes(work, choice)
        return max(whole, attended + joined, super().temporary_bytes(work, choice, limits))

    def _keeps_normed(self, work: WorkSize, choice: Choice) -> bool:
        """Whether the rows that a single block normed have a place in the pool, as `Workspace.kept_rows` has it."""
        room = choice.token_chunk >= work.rows and self.ffn_dim >= 2 * self.dim
        return self.norms_once and room and choice.head_groups == 1 and work.cards == 1 and not guides(work)

    def _attention_bytes(self, work: WorkSize, choice: Choice, limits: Limits) -> int:
        """Image rows attend to a negative prompt as well, of queries or beside an output that are kept meanwhile.

        Several cards have a group's queries, keys and values beside either prompt, and two results of them.
        """
        opposed = self._token_bytes(work) if guides(work) else 0
        if work.cards > 1:
            opposed += 7 * opposed // choice.head_groups
        return opposed + super()._attention_bytes(work, choice, limits)

    def _attended_bytes(self, work: WorkSize, choice: Choice) -> int:
        """Guided attention lies in q's bytes."""
        return 0 if guides(work) else super()._attended_bytes(work, choice)

    def _token_bytes(self, work: WorkSize) -> int:
        return work.rows * self.dim * self.compute_bytes

    def pass_flops(self, work: WorkSize, cache_text_kv: bool) -> tuple[float, float]:
        """Double and single blocks; modulation is made once per run."""
        dim, mlp = self.dim, self.ffn_dim
        num_single = self.num_blocks - self.num_double
        per_row = self.num_double * (4 * dim**2 + 2 * dim * mlp)
        per_row += num_single * (3 * dim**2 + dim * mlp + (dim + mlp) * dim)
        attention = 4.0 * work.rows * work.tokens * dim * (1 + guides(work))
        return 2.0 * work.rows * per_row, self.num_blocks * attention

    def moved_tensors(self) -> float:
        """Double blocks have no cross-attention; single ones add attention and MLP at once, whose GELU is a step."""
        return self.num_double * DOUBLE_PASSES + (self.num_blocks - self.num_double) * SINGLE_PASSES

    def text_bytes(self, work: WorkSize, choice: Choice) -> int:
        """Text and modulation of one step; the other steps' wait in host memory."""
        modulation = 12 * self.num_double + 3 * (self.num_blocks - self.num_double) + 2
        of_a_prompt = (2 * (TEXT_TOKENS + IMAGE_TOKENS) + 2 * modulation) * self.dim * self.compute_bytes
        return (1 + guides(work)) * of_a_prompt

    def _text_projection_bytes(self, work: WorkSize) -> int:
        return 0


def guides(work: WorkSize) -> bool:
    """Whether attention is guided by a negative prompt."""
    return isinstance(work, SectionSize) and work.nag
