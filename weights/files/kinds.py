"""What kind of model a file holds, by the names of its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .checkpoint import Checkpoint, CheckpointError, some_names
from .lora_keys import is_lora, lora_title


@dataclass(frozen=True)
class FileKind:
    """What a file is: `kind` is for code, `title` has its article."""

    kind: str
    title: str


@dataclass(frozen=True)
class WantedKind:
    """What a loader opens, in its own words for refusals; `companions` are the kinds that go with it elsewhere."""

    kind: str
    title: str
    expected: str
    file_names: str
    companions: tuple[str, ...]


HUNYUAN = FileKind("hunyuan transformer", "a HunyuanVideo transformer")
NOT = "not "

# All fragments must occur in the names (or must not, with NOT before them); each name has a newline and a dot before it
# and a newline after it.
FINGERPRINTS: tuple[tuple[FileKind, tuple[str, ...]], ...] = (
    (FileKind("wan vace module", "a Wan VACE module without its transformer"), (".vace_blocks.0.", NOT + ".blocks.0.")),
    (
        FileKind("unknown", "an audio module for Wan (MultiTalk, InfiniteTalk)"),
        (".audio_cross_attn.", NOT + ".self_attn.q."),
    ),
    (FileKind("framepack transformer", "a FramePack transformer"), ("clean_x_embedder.proj_4x.",)),
    (FileKind("wan transformer", "a Wan transformer"), (".patch_embedding.weight", ".cross_attn.norm_q.")),
    (FileKind("wan transformer", "a Wan transformer"), ("time_projection.1.", ".cross_attn.norm_q.")),
    (FileKind("wan transformer", "a Wan transformer"), ("condition_embedder.time_proj.", ".attn2.to_q.")),
    (FileKind("wan vae", "a Wan VAE"), (".decoder.middle.0.residual.0.gamma\n", ".conv2.weight\n")),
    (FileKind("wan vae", "a Wan VAE (diffusers layout)"), ("decoder.mid_block.resnets.0.norm1.gamma\n",)),
    (FileKind("hunyuan vae", "a HunyuanVideo VAE"), ("decoder.conv_in.conv.", "post_quant_conv.")),
    (FileKind("tiny decoder", "a tiny decoder (TAEHV)"), ("decoder.22.bias\n", "decoder.7.conv.weight\n")),
    (FileKind("flashvsr decoder", "FlashVSR's decoder"), ("decoder.26.bias\n", "decoder.9.conv.weight\n")),
    (
        FileKind("flashvsr projection", "FlashVSR's projection of the small video"),
        (".conv1.weight\n", ".norm2.gamma\n", ".linear_layers.0.weight\n"),
    ),
    (FileKind("umt5 encoder", "a UMT5 text encoder"), ("block.1.layer.0.SelfAttention.relative_att",)),
    (FileKind("umt5 encoder", "a UMT5 text encoder"), (".token_embedding.weight", ".blocks.0.pos_embedding.")),
    (FileKind("umt5 encoder", "a UMT5 text encoder (GGUF layout)"), ("enc.blk.1.attn_rel_b",)),
    (FileKind("siglip vision", "a SigLIP vision model"), ("vision_model.encoder.layers.0.", "vision_model.head.")),
    (FileKind("clip vision", "a CLIP vision model"), ("vision_model.encoder.layers.0.",)),
    (FileKind("clip vision", "a CLIP vision model"), ("visual.transformer.",)),
    (FileKind("unknown", "a T5 text encoder (of Flux or SD 3)"), ("block.0.layer.0.SelfAttention.",)),
    (HUNYUAN, ("double_blocks.0.", "individual_token_refiner")),
    (HUNYUAN, ("x_embedder.proj.", "token_refiner.refiner_blocks.")),
    (FileKind("unknown", "a Flux transformer"), ("double_blocks.0.", "single_blocks.0.")),
    (FileKind("unknown", "a Flux transformer (diffusers)"), ("x_embedder.", "single_transformer_blocks.0.")),
    (FileKind("unknown", "a Stable Diffusion 3 transformer"), ("joint_blocks.0.",)),
    (FileKind("unknown", "a Stable Diffusion checkpoint"), ("input_blocks.0.0.",)),
    (FileKind("unknown", "a Stable Diffusion UNet"), ("down_blocks.0.resnets.0.", "time_embedding.")),
    (FileKind("unknown", "an LTX-Video transformer"), ("adaln_single.", "scale_shift_table")),
    (FileKind("clip text", "a CLIP text encoder"), ("text_model.encoder.layers.0.",)),
    (FileKind("llama encoder", "a LLaMA text encoder"), ("layers.0.self_attn.q_proj.", "embed_tokens.")),
    (FileKind("llama encoder", "a LLaMA text encoder (GGUF layout)"), (".blk.0.ffn_gate.", ".token_embd.")),
    (FileKind("unknown", "an image VAE, not Wan's"), ("decoder.conv_in.", "decoder.conv_out.")),
)

# What else a file can be loaded as, by its kind.
LOADERS: Mapping[str, str] = {
    "wan transformer": "the Wan loader",
    "framepack transformer": "the FramePack loader",
    HUNYUAN.kind: "ComfyUI's own loader",
    "flashvsr decoder": "the FlashVSR loader (--decoder of `upscale`)",
    "flashvsr projection": "the FlashVSR loader (--projection of `upscale`)",
}
SLOTS: Mapping[str, str] = {
    "wan vae": "the VAE",
    "hunyuan vae": "the VAE",
    "tiny decoder": "the VAE of a draft (--decoder; Load VAE in ComfyUI)",
    "umt5 encoder": "the text encoder",
    "clip vision": "the CLIP vision model",
    "siglip vision": "the CLIP vision model",
    "wan vace module": "the VACE module",
}


def file_kind(names: Iterable[str]) -> FileKind:
    """What kind of model a file with these tensor names (in any layout) is."""
    names = list(names)
    if is_lora(names):
        return FileKind("lora", lora_title(names))
    text = "\n." + "\n.".join(names) + "\n"
    for kind, fragments in FINGERPRINTS:
        if all((part.removeprefix(NOT) in text) != part.startswith(NOT) for part in fragments):
            return kind
    return FileKind("unknown", f"no known model ({some_names(names, 'tensor')})")


def check_kind(checkpoint: Checkpoint, wanted: WantedKind) -> None:
    """CheckpointError, which says what the file is and where it belongs, unless it is of the wanted kind."""
    found = file_kind(checkpoint.tensors)
    if found.kind != wanted.kind:
        raise CheckpointError(
            f"{checkpoint.path}: this is {found.title}; expected {wanted.expected}; {_advice(found.kind, wanted)}"
        )


def _advice(found: str, wanted: WantedKind) -> str:
    if found == "lora":
        return f"load it as a LoRA, on top of {wanted.title}"
    if found in wanted.companions:
        return f"load it as {SLOTS[found]}, and {wanted.title} here"
    if found in LOADERS:
        return f"load it with {LOADERS[found]}, or choose {wanted.title} file ({wanted.file_names})"
    return f"choose {wanted.title} file ({wanted.file_names})"
