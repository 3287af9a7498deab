"""What a model and a piece of work cost: bytes of VRAM and seconds, by arithmetic alone.

The activation arithmetic mirrors `wanvideo/network/model.py`: x, k and v are the only token-sized buffers, and q where
it is not made for some rows at a time. Sizes are bytes, rates are decimal (1 TFLOP/s = 1e12, 1 GB/s = 1e9), and "rows"
are the tokens of all samples of a pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

from ...system.card_profile import CardProfile
from ...system.rounds import most_queries
from ...system.sizes import GIB
from .attention_bytes import AttentionBytes
from .card_times import EAGER_PASSES, PLAIN, SDPA, PassWork
from .parking import Parking
from .vae_footprint import VaeFootprint

MIB = 2**20
# Outside PyTorch's allocator, on an H200 after models of every format ran in one process: libraries and kernels too.
CONTEXT_BYTES = int(0.765 * GIB)
UNLIMITED = 1 << 60  # VRAM, where the device has no memory of its own

# Token-sized tensors that a block of Wan's reads and writes between its products: norms (2 each), rotated q and k,
# attention's result over q, residuals (3 each).
BLOCK_PASSES = 25


@dataclass(frozen=True)
class ModelFootprint:
    """A transformer as the planner sees it.

    `block_bytes` holds the stored bytes of each block in order, `text_kv_bytes` the part of every block that makes
    keys and values of the text (and image) and need not be there once they are cached (0: cannot be cached).
    `per_run_bytes` of all blocks together are needed once per run: they stay in host memory, not among the others.
    `fixed_bytes` are the weights outside the blocks. `scratch_elements` are the most weight elements unpacked at a
    time: 0 where weights are stored in the compute dtype. `transient_bytes` of the fixed ones are needed only for a
    moment before the blocks, and can be brought for it; `brought_bytes` of them at a time, in the bytes of q, k and v
    where these suffice. `unpacked_bytes` are the most that is unpacked at a time of one of the fixed ones.
    `row_bytes` of a row of a chunk are there beside what is normed or added of it: in 8 bits what is multiplied;
    `key_row_bytes` are those of a layer that makes keys. `product_bytes` come to it for a chunk of any size.
    `copies_rows`: these are copies, and products may be written over what they read; `norms_in_8_bits`: norms make
    them, and what is normed is nowhere else. `streams_queries`: q can be made for some rows at a time. `stage_bytes`
    are those of each block's stages in order, where blocks can be streamed in stages. `packs_keys`: keys and values may
    be kept in 8 bits, as the user computes in 8 bits anyway (`in_8_bits`). `packs_exchange`: what several cards
    exchange travels in 8 bits. `home_bytes` is what each block takes where it lies, with what is needed once per run.
    `form` is the name of the format that most of the blocks' weights have, `attention` that of the backend: by them a
    card's measurements are looked up.
    """

    name: str
    dim: int
    ffn_dim: int
    num_heads: int
    block_bytes: tuple[int, ...]
    fixed_bytes: int
    per_run_bytes: int = 0
    text_kv_bytes: int = 0
    transient_bytes: int = 0
    scratch_elements: int = 0
    in_channels: int = 16
    latent_channels: int = 16
    text_tokens: int = 512
    image_tokens: int = 0
    compute_bytes: int = 2
    streams_queries: bool = False
    stage_bytes: tuple[tuple[int, ...], ...] = ()
    packs_keys: bool = False
    in_8_bits: bool = False
    packs_exchange: bool = False
    brought_bytes: int = 0
    unpacked_bytes: int = 0
    row_bytes: int = 0
    key_row_bytes: int = 0
    product_bytes: int = 0
    copies_rows: bool = False
    norms_in_8_bits: bool = False
    vae: VaeFootprint | None = None
    home_bytes: tuple[int, ...] = ()
    form: str = PLAIN
    attention: str = SDPA

    @property
    def num_blocks(self) -> int:
        return len(self.block_bytes)

    @property
    def context_tokens(self) -> int:
        return self.text_tokens + self.image_tokens

    def streamable_bytes(self, cache_text_kv: bool) -> tuple[int, ...]:
        """Bytes of each block that a pass needs, with or without the text's keys and values cached."""
        spared = self.text_kv_bytes if cache_text_kv else 0
        return tuple(size - spared for size in self.block_bytes)

    def activation_bytes(self, work: WorkSize, choice: Choice, limits: Limits) -> int:
        """x, the pool of q, k, v and FFN hidden, rotary angles, and the largest of the temporaries."""
        pool = self.pool_bytes(work, choice)
        angles = 2 * 4 * work.tokens * (self.dim // self.num_heads // 2)  # cos and sin, fp32
        blocks = work.rows * self.dim * self.compute_bytes + angles + self.temporary_bytes(work, choice, limits)
        nbytes = max(pool + max(blocks, self._embedding_bytes(pool, choice)), self._prompt_bytes(work, choice))
        if work.num_sharing == work.cards:
            return nbytes  # else all cards share a pass of one sample alone, which an expert without guidance has
        return max(nbytes, ModelFootprint.activation_bytes(self, replace(work, batch=1), choice, limits))

    def pool_bytes(self, work: WorkSize, choice: Choice) -> int:
        """q, k and v; hidden rows of the FFN lie in the same bytes."""
        dim, rows, element = self.dim, work.rows, self.compute_bytes
        kept = rows * (dim + 4 * self.num_heads) if choice.packed_keys else rows * dim * element  # of k, and of v
        hidden = min(choice.token_chunk, rows) * self.ffn_dim * element
        return max(2 * kept + choice.query_rows(work) * dim * element, hidden)

    def _embedding_bytes(self, pool: int, choice: Choice) -> int:
        """What embeds the timestep, before there is x: rows of a weight that were brought, and unpacked."""
        brought = self.brought_bytes if choice.transient_fixed and self.brought_bytes > pool else 0
        return brought + self.unpacked_bytes

    def _prompt_bytes(self, work: WorkSize, choice: Choice) -> int:
        """What embeds a prompt, before a pass has anything: the same, and the text between two layers."""
        return self._embedding_bytes(0, choice) + 2 * work.batch * self.text_tokens * self.dim * self.compute_bytes

    def temporary_bytes(self, work: WorkSize, choice: Choice, limits: Limits) -> int:
        """The largest of what is needed for a moment of a block."""
        chunk, row = min(choice.token_chunk, work.rows), self.dim * self.compute_bytes
        normed, read, key_read = self._normed_bytes(limits), self.row_bytes, self.key_row_bytes
        if self.copies_rows and limits.fused:
            # of what is normed, or attended; of hidden rows, in which the product lies then
            product, of_attended = max(row + key_read, read), key_read
            packing = (0 if self.norms_in_8_bits else row) + row + key_read
        else:
            product, of_attended = normed + read, read
            packing = max(2 * row, normed) + key_read  # k, then v, beside x
        return max(
            self._attention_bytes(work, choice, limits),
            chunk * (max(product, packing) if choice.packed_keys else product) + self.product_bytes,
            self._attended_bytes(work, choice) + chunk * of_attended + self.product_bytes,
            0 if choice.cache_text_kv else self._text_projection_bytes(work),
        )

    def room_bytes(self, work: WorkSize, choice: Choice, limits: Limits) -> int:
        """What every pass may ask a GPU's allocator for before its blocks: see `Workspace.make_room`."""
        return self.temporary_bytes(work, choice, limits) if limits.vram_budget_bytes < UNLIMITED else 0

    def _normed_bytes(self, limits: Limits) -> int:
        """Of a row that is normed; eager steps work in fp32."""
        return self.dim * self.compute_bytes if limits.fused else max(16 * self.dim, 8 * self.ffn_dim)

    def _attended_bytes(self, work: WorkSize, choice: Choice) -> int:
        """Attention's output while it is projected, into q's bytes; in groups it was copied there itself."""
        return choice.query_rows(work) * self.dim * self.compute_bytes if choice.head_groups == 1 else 0

    def _attention_bytes(self, work: WorkSize, choice: Choice, limits: Limits) -> int:
        """Output and workspace of one group of heads over all tokens, or of attention to text and image."""
        queries = choice.query_rows(work)
        output = queries * self.dim * self.compute_bytes
        if work.num_sharing > 1:
            return max(self._exchange_bytes(work, choice, limits), -(-output // choice.head_groups))
        over_tokens = output
        if choice.packed_keys:  # k and v unpacked
            over_tokens += 2 * work.rows * self.dim * self.compute_bytes
        if work.all_queries and choice.head_groups > 1:  # others' functions take q, k and v in one piece each
            over_tokens += (queries + 2 * work.rows) * self.dim * self.compute_bytes
        of_group = -(-over_tokens // choice.head_groups)
        of_group += self._attention_workspace(queries, work.rows, limits, choice.head_groups, self.key_length(work))
        return max(of_group, self._over_text_bytes(work, choice, limits))

    def _over_text_bytes(self, work: WorkSize, choice: Choice, limits: Limits) -> int:
        """Of attention to the text some rows and all heads (`Workspace.attends_in_chunks`); with the image's summed."""
        rows, keys, row = choice.query_rows(work), work.batch * self.context_tokens, self.dim * self.compute_bytes
        if choice.head_groups > 1 and not self.image_tokens:
            rows = min(rows, choice.token_chunk)
            return rows * row + self._attention_workspace(rows, self.context_tokens, limits)
        outputs = (2 if self.image_tokens else 1) * rows * row
        return -(-outputs // choice.head_groups) + self._attention_workspace(rows, keys, limits, choice.head_groups)

    def key_length(self, work: WorkSize) -> int:
        """The keys of a sample in self-attention; 0 where not all calls have as many, or that is not known."""
        return 0

    def _attention_workspace(
        self, queries: int, keys: int, limits: Limits, head_groups: int = 1, length: int = 0
    ) -> int:
        """What attention of a group of heads takes beside its output."""
        if limits.attention is None:
            return 0
        heads = -(-self.num_heads // head_groups)
        return limits.attention.nbytes(queries, keys, heads, self.dim // self.num_heads, length)

    def _exchange_bytes(self, work: WorkSize, choice: Choice, limits: Limits) -> int:
        """What several cards' attention holds of the largest group of heads: see `team/heads.py`.

        Queries, keys and values of all tokens, packed ones for the others and attention's result, packed ones of that,
        and what came back; those on their way again where there are several groups. Where all heads have room at once,
        groups that hide the exchange (`runtime/several.py: hidden_sizes`) hold no more than these.
        """
        tokens, parts = work.batch * work.num_sharing // work.cards * work.tokens, work.num_sharing * choice.head_groups
        heads, head_dim, turns = -(-self.num_heads // parts), self.dim // self.num_heads, min(2, choice.head_groups)
        group = tokens * heads * head_dim * self.compute_bytes
        workspace = self._attention_workspace(tokens, tokens, limits, parts)
        return (2 * 3 + 2) * turns * group + group + workspace

    def exchanged_bytes(self, work: WorkSize) -> int:
        """What a card gets from the others in a pass: queries, keys, values, and what attention made of its tokens."""
        numbers = self.num_blocks * 4 * work.rows * self.dim * (work.num_sharing - 1) // work.num_sharing
        packed = numbers + 4 * numbers * self.num_heads // self.dim  # and a scale for each head of a token
        return packed if self.packs_exchange else numbers * self.compute_bytes

    def _text_projection_bytes(self, work: WorkSize) -> int:
        """Keys and values of the text, made within each pass: one unpacked weight and fp32 temporaries of its norm."""
        weight = self.dim**2 * self.compute_bytes if self.scratch_elements else 0
        return weight + work.batch * self.context_tokens * self.dim * (2 * 4 + 2 * self.compute_bytes)

    def text_cache_bytes(self, work: WorkSize) -> int:
        """Keys and values of all prompts' text in every block."""
        rows = work.batch * work.passes_per_step * self.context_tokens
        return self.num_blocks * 2 * rows * self.dim * self.compute_bytes

    def pass_flops(self, work: WorkSize, cache_text_kv: bool) -> tuple[float, float]:
        """FLOPs of one pass, (matrix products, attention): per block 2 M (6 d^2 + 2 d ffn) and 4 tokens^2 d batch."""
        dim = self.dim
        products = 2.0 * work.rows * (6 * dim**2 + 2 * dim * self.ffn_dim)
        if not cache_text_kv:
            products += 2.0 * work.batch * self.context_tokens * 2 * dim**2
        attention = 4.0 * work.rows * (work.tokens + self.context_tokens) * dim
        return self.num_blocks * products, self.num_blocks * attention

    def moved_tensors(self) -> float:
        """Token-sized tensors that all blocks read and write between their products in a pass."""
        return self.num_blocks * BLOCK_PASSES

    def pass_work(self, work: WorkSize, cache_text_kv: bool, fused: bool) -> PassWork:
        """What a pass computes, for a card's measurements."""
        products, attention = self.pass_flops(work, cache_text_kv)
        within = min(attention, 4.0 * self.num_blocks * work.rows * work.tokens * self.dim)
        moved = self.moved_tensors() * work.rows * self.dim * self.compute_bytes
        return PassWork(
            dim=self.dim,
            ffn_dim=self.ffn_dim,
            ffn_share=self.ffn_dim / (self.ffn_dim + 3 * self.dim),
            form=self.form,
            attention=self.attention,
            tokens=work.tokens,
            context_keys=self.context_tokens,
            product_flops=products,
            self_flops=within,
            cross_flops=attention - within,
            block_weights=products / (2.0 * work.rows),
            moved_bytes=moved * (1 if fused else EAGER_PASSES),
        )

    def text_bytes(self, work: WorkSize, choice: Choice) -> int:
        """The embedded prompts and, where cached, their keys and values."""
        context_rows = work.batch * work.passes_per_step * self.context_tokens
        cached = self.text_cache_bytes(work) if choice.cache_text_kv else 0
        return 2 * context_rows * self.dim * self.compute_bytes + cached


@dataclass(frozen=True)
class WorkSize:
    """What to make: a video of `frames` x `height` x `width` pixels, `batch` samples in one forward pass.

    `passes_per_step` is 2 where guidance runs cond and uncond one after the other. Each pass is made by so many `cards`
    together. `all_queries`: something looks at attention that must see all queries, keys and values at once, as they
    were computed.
    """

    frames: int
    height: int
    width: int
    batch: int = 1
    passes_per_step: int = 1
    stride: tuple[int, int, int] = (4, 8, 8)
    patch: tuple[int, int, int] = (1, 2, 2)
    cards: int = 1
    all_queries: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width", "batch", "passes_per_step", "cards"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @cached_property
    def latent_size(self) -> tuple[int, int, int]:
        """Latent frames, height and width; the first latent frame holds a single frame."""
        time, height, width = self.stride
        return (self.frames - 1) // time + 1, -(-self.height // height), -(-self.width // width)

    @cached_property
    def latent_positions(self) -> int:
        return math.prod(self.latent_size)

    @cached_property
    def tokens(self) -> int:
        """Tokens of one sample."""
        return math.prod(-(-size // patch) for size, patch in zip(self.latent_size, self.patch, strict=True))

    @cached_property
    def rows(self) -> int:
        """Tokens of all samples of one pass that one card has."""
        return self.batch * -(-self.tokens // self.cards)

    def advice(self, frames: int) -> str:
        """What to do so that there are at most so many frames."""
        return f"make at most {frames} frames"

    @property
    def size_unit(self) -> int:
        """Height and width are multiples of this many pixels."""
        return self.stride[1] * self.patch[1]

    @property
    def num_sharing(self) -> int:
        """How many cards have parts of each sample; samples are shared out first."""
        return self.cards // math.gcd(self.batch, self.cards)

    def __str__(self) -> str:
        cards = f", on {self.cards} cards" if self.cards > 1 else ""
        return f"{self.width}x{self.height}, {self.frames} frame{'s' if self.frames > 1 else ''}{cards}"


@dataclass(frozen=True)
class Choice:
    """The knobs that the planner turns."""

    token_chunk: int
    head_groups: int
    cache_text_kv: bool
    num_resident: int
    transient_fixed: bool
    query_chunk: int | None = None  # rows whose queries exist at a time; None: all
    in_stages: bool = False  # the ring holds stages of blocks
    packed_keys: bool = False  # self-attention's keys and values are kept in 8 bits

    def query_rows(self, work: WorkSize) -> int:
        """At most so many rows' queries exist at a time; those of a chunk belong to one sample."""
        allowed = self.allowed_queries(work)
        return allowed if allowed in (work.rows, work.tokens) else most_queries(work.tokens, allowed)

    def allowed_queries(self, work: WorkSize) -> int:
        """So many there may be: more than there are where they go in parts that are about even."""
        if self.query_chunk is None or work.rows <= self.query_chunk:
            return work.rows
        return min(work.tokens, self.query_chunk)


@dataclass(frozen=True)
class CardBudget:
    """What one card of several may use, of bytes that count as `Limits.vram_budget_bytes`."""

    name: str
    budget_bytes: int


@dataclass(frozen=True)
class Limits:
    """What a run may use, what the machine brings, and what the user fixed by hand.

    `vram_budget_bytes` is for the whole process. At most `context_bytes` of it lie outside PyTorch's allocator (see
    `limits.py: context_bound`). `ram_budget_bytes` and `pinned_cap_bytes` are unlimited when None. `blocks_to_swap` is
    -1 for the planner's choice, or exactly that many streamed blocks; `num_slots` (prefetch + 1) likewise when not
    None. `fused` says that one-pass elementwise kernels run here, `attention` what its backend takes (None: next to
    nothing). The default rates are those of a small card in an old slot; measured ones make better plans. `card` is
    everything that was measured of this one; where it tells of a model, its times count and are shown. `cards` are all
    those that share a pass, of which the least has the budget: one plan is for all of them. `link_gbps` is the slowest
    way between two of them, where it was measured. `parking` says where streamed blocks lie.
    """

    vram_budget_bytes: int
    context_bytes: int = CONTEXT_BYTES
    ram_budget_bytes: int | None = None
    pinned_cap_bytes: int | None = None
    blocks_to_swap: int = -1
    num_slots: int | None = None
    fused: bool = True
    attention: AttentionBytes | None = None
    tflops_matmul: float = 40.0
    tflops_attention: float = 30.0
    h2d_gbps: float = 12.0
    pageable_gbps: float = 5.0
    disk_gbps: float = 1.5
    card: CardProfile | None = None
    cards: tuple[CardBudget, ...] = ()
    link_gbps: float | None = None
    parking: Parking | None = None

    @property
    def ram_is_the_device(self) -> bool:
        """Whether blocks lie in RAM when they are on the device, as on a CPU."""
        return self.vram_budget_bytes >= UNLIMITED

    def __post_init__(self) -> None:
        for name in ("tflops_matmul", "tflops_attention", "h2d_gbps", "pageable_gbps", "disk_gbps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; a rate must be above 0")
