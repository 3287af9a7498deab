"""What a model file is, in words and figures: kind, variant, dimensions, dtypes per part, bytes per block."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ..framepack.text.checkpoint import clip_of, llama_of, siglip_of
from ..framepack.vae.checkpoint import HUNYUAN_FORMAT
from ..runtime.family import Description
from ..vae.tiny_files import TINY_FORMAT
from ..wanvideo.text.checkpoint import text_encoder_of
from ..wanvideo.vae.checkpoint import WAN_FORMAT
from ..weights.files.checkpoint import Checkpoint, CheckpointError, TensorInfo
from ..weights.files.kinds import FileKind, file_kind
from ..weights.lora.describe import describe_lora
from .table import FAMILIES, family_of_kind


@dataclass(frozen=True)
class PartSummary:
    """The tensors of one part of a model ("blocks", "embeddings", "head" …) stored in one dtype."""

    part: str
    dtype: str
    num_tensors: int
    num_bytes: int


@dataclass(frozen=True)
class FileIdentity:
    """What a file is. `kind` is that of `file_kind`; `block_bytes` is (least, most) or None without
    blocks; `companions` says which other files it works with; `refusal` why its loader would not take it.
    """

    kind: str
    title: str
    config: str
    parts: tuple[PartSummary, ...]
    num_blocks: int
    block_bytes: tuple[int, int] | None
    total_bytes: int
    companions: tuple[str, ...]
    refusal: str = ""


def identify(checkpoint: Checkpoint) -> FileIdentity:
    """Say what a checkpoint is from its names and shapes alone; names may be in any known layout."""
    file, kind = checkpoint, file_kind(checkpoint.tensors)
    family = family_of_kind(kind.kind)
    if family is None:
        said = _describe_other(kind, checkpoint)
    else:
        checkpoint = family.with_own_names(checkpoint)
        said = family.describe(checkpoint)
    block_bytes = _bytes_per_block(checkpoint.tensors.values())
    return FileIdentity(
        kind=kind.kind,
        title=said.title,
        config=said.dimensions,
        parts=_parts(checkpoint.tensors.values()),
        num_blocks=len(block_bytes),
        block_bytes=(min(block_bytes), max(block_bytes)) if block_bytes else None,
        total_bytes=sum(info.nbytes for info in checkpoint.tensors.values()),
        companions=said.companions,
        refusal=_refusal(file, kind.kind),
    )


def describe(identity: FileIdentity) -> str:
    """A few lines of text for people."""
    lines = [f"{identity.title}  ({identity.kind})"]
    if identity.config:
        lines.append(f"  dimensions  {identity.config}")
    for part in identity.parts:
        lines.append(f"  {part.part:<11} {part.dtype:<14} {part.num_tensors:>5} tensors  {_size(part.num_bytes):>10}")
    if identity.block_bytes is not None:
        least, most = (_size(num) for num in identity.block_bytes)
        each = least if least == most else f"{least} to {most}"
        lines.append(f"  per block   {each}, {identity.num_blocks} blocks")
    lines.append(f"  total       {_size(identity.total_bytes)}")
    lines += [f"  needs       {companion}" for companion in identity.companions]
    if identity.refusal:
        lines.append(f"  refused     {identity.refusal}")
    return "\n".join(lines)


# What loads files of a kind, as far as it goes without their bytes; a family's own are in its table entry.
LOADERS: Mapping[str, Callable[[Checkpoint], object]] = {
    **{family.wanted.kind: family.check for family in FAMILIES},
    "wan vae": WAN_FORMAT.opened,
    "hunyuan vae": HUNYUAN_FORMAT.opened,
    "tiny decoder": TINY_FORMAT.opened,
    "umt5 encoder": text_encoder_of,
    "llama encoder": llama_of,
    "clip text": clip_of,
    "siglip vision": siglip_of,
}


def _refusal(checkpoint: Checkpoint, kind: str) -> str:
    """Why the loader of such files does not take this one; "" where it does, or none is ours."""
    try:
        if kind in LOADERS:
            LOADERS[kind](checkpoint)
    except CheckpointError as error:
        return str(error).removeprefix(str(checkpoint.path)).lstrip(": ")
    return ""


# --- other files -----------------------------------------------------------------------------------------


def _describe_other(found: FileKind, checkpoint: Checkpoint) -> Description:
    """As far as one or two shapes tell."""
    # "a Wan VAE" -> "Wan VAE": an identity is a heading, not the end of a sentence.
    kind, title = found.kind, re.sub(r"^an? ", "", found.title)
    if kind == "wan vae":
        conv = _first_shape(checkpoint, r"decoder\.(conv1|conv_in)\.weight$", 5)  # [dim, z, 3, 3, 3]
        if conv is not None:
            version = {16: "Wan 2.1", 48: "Wan 2.2"}.get(conv[1], "Wan")
            dimensions = f"{conv[1]} latent channels, decoder width {conv[0]}"
            return Description(title.replace("Wan", version), dimensions)
    if kind == "umt5 encoder":
        table = _first_shape(checkpoint, r"(shared|token_embedding|token_embd)\.weight$", 2)
        if table is not None:
            inside = "spiece_model" in checkpoint.tensors or "tokenizer.ggml.model" in checkpoint.metadata
            tokenizer = "with its tokenizer" if inside else "needs a spiece.model"
            return Description(title, f"width {table[1]}, {table[0]} tokens, {tokenizer}")
    if kind in ("clip vision", "siglip vision"):
        patch = _first_shape(checkpoint, r"(patch_embedding|conv1)\.weight$", 4)  # [width, 3, 14, 14]
        if patch is not None:
            return Description(title, f"width {patch[0]}, patch {patch[2]}")
    if kind == "lora":
        return Description(title, describe_lora(checkpoint), ("the transformer that it was trained on",))
    return Description(title)


def _first_shape(checkpoint: Checkpoint, pattern: str, num_dims: int) -> tuple[int, ...] | None:
    for name, info in checkpoint.tensors.items():
        shape = info.unpacked_shape
        if re.search(pattern, name) and len(shape) == num_dims:
            return shape
    return None


# --- bytes -----------------------------------------------------------------------------------------------

BLOCK_PATH = re.compile(r"(?:^|.*?\.)(?:blocks?|blk|layers|resblocks|(?:single_)?transformer_blocks)\.\d+(?=\.)")


def _part(name: str) -> str:
    if BLOCK_PATH.match(name):
        return "blocks"
    if re.match(r"(head|proj_out|norm_out)\.", name):
        return "head"
    return "embeddings" if "emb" in name or name.startswith(("time_projection.", "image_projection.")) else "other"


def _parts(tensors: Iterable[TensorInfo]) -> tuple[PartSummary, ...]:
    groups: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for info in tensors:
        dtype = info.quant or str(info.dtype).removeprefix("torch.")
        groups[_part(info.name), dtype].append(info.nbytes)
    order = ("embeddings", "blocks", "head", "other")
    summaries = [PartSummary(part, dtype, len(sizes), sum(sizes)) for (part, dtype), sizes in groups.items()]
    return tuple(sorted(summaries, key=lambda part: (order.index(part.part), -part.num_bytes)))


def _bytes_per_block(tensors: Iterable[TensorInfo]) -> list[int]:
    blocks: defaultdict[str, int] = defaultdict(int)
    for info in tensors:
        if match := BLOCK_PATH.match(info.name):
            blocks[match[0]] += info.nbytes
    return list(blocks.values())


def _size(num_bytes: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes} B"
