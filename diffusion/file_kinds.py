"""What kind of model a file holds, by the names of its tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .checkpoint import some_names


@dataclass(frozen=True)
class FileKind:
    """What a file is: `kind` is for code, `title` (with its article) and `advice` complete an error's sentence."""

    kind: str
    title: str
    advice: str


AS_LORA = "load it as a LoRA, on top of a Wan transformer"
AS_VAE = "load it as the VAE, and a Wan transformer here"
AS_TEXT = "load it as the text encoder, and a Wan transformer here"
AS_VISION = "load it as the CLIP vision model, and a Wan transformer here"
NOT_OURS = "choose a Wan transformer file (wan2.1_… or wan2.2_…)"

# All fragments must occur in the names, each of which has a newline before and after it.
FINGERPRINTS: tuple[tuple[FileKind, tuple[str, ...]], ...] = (
    (FileKind("lora", "a LoRA", AS_LORA), (".lora_A.",)),
    (FileKind("lora", "a LoRA", AS_LORA), (".lora_down.",)),
    (FileKind("lora", "a LoRA", AS_LORA), (".lora_up.",)),
    (FileKind("lora", "a LoRA (full differences)", AS_LORA), (".diff\n",)),
    (
        FileKind("framepack transformer", "a FramePack transformer", "load it with the FramePack loader"),
        ("clean_x_embedder.proj_4x.",),
    ),
    (FileKind("wan transformer", "a Wan transformer", ""), ("patch_embedding.weight\n", ".cross_attn.norm_q.")),
    (FileKind("wan transformer", "a Wan transformer", ""), ("time_projection.1.", ".cross_attn.norm_q.")),
    (FileKind("wan transformer", "a Wan transformer", ""), ("condition_embedder.time_proj.", ".attn2.to_q.")),
    (FileKind("wan vae", "a Wan VAE", AS_VAE), ("\ndecoder.middle.0.residual.0.gamma\n", "conv2.weight\n")),
    (FileKind("wan vae", "a Wan VAE (diffusers layout)", AS_VAE), ("decoder.mid_block.resnets.0.norm1.gamma\n",)),
    (FileKind("umt5 encoder", "a UMT5 text encoder", AS_TEXT), ("block.1.layer.0.SelfAttention.relative_att",)),
    (FileKind("umt5 encoder", "a UMT5 text encoder", AS_TEXT), ("token_embedding.weight\n", "blocks.0.pos_embedding.")),
    (FileKind("umt5 encoder", "a UMT5 text encoder (GGUF layout)", AS_TEXT), ("enc.blk.1.attn_rel_b",)),
    (FileKind("clip vision", "a CLIP vision model", AS_VISION), ("vision_model.encoder.layers.0.",)),
    (FileKind("clip vision", "a CLIP vision model", AS_VISION), ("visual.transformer.",)),
    (FileKind("unknown", "a Wan VACE module without its transformer", NOT_OURS), ("vace_blocks.0.",)),
    (FileKind("unknown", "a T5 text encoder (of Flux or SD 3)", NOT_OURS), ("block.0.layer.0.SelfAttention.",)),
    (FileKind("unknown", "a HunyuanVideo transformer", NOT_OURS), ("double_blocks.0.", "individual_token_refiner")),
    (FileKind("unknown", "a Flux transformer", NOT_OURS), ("double_blocks.0.", "single_blocks.0.")),
    (FileKind("unknown", "a Flux transformer (diffusers)", NOT_OURS), ("x_embedder.", "single_transformer_blocks.0.")),
    (FileKind("unknown", "a Stable Diffusion 3 transformer", NOT_OURS), ("joint_blocks.0.",)),
    (FileKind("unknown", "a Stable Diffusion checkpoint", NOT_OURS), ("input_blocks.0.0.",)),
    (FileKind("unknown", "a Stable Diffusion UNet", NOT_OURS), ("down_blocks.0.resnets.0.", "time_embedding.")),
    (FileKind("unknown", "an LTX-Video transformer", NOT_OURS), ("adaln_single.", "scale_shift_table")),
    (FileKind("unknown", "a CLIP text encoder", NOT_OURS), ("text_model.encoder.layers.0.",)),
    (FileKind("unknown", "an image VAE, not Wan's", NOT_OURS), ("decoder.conv_in.", "decoder.conv_out.")),
)  # fmt: skip


def file_kind(names: Iterable[str]) -> FileKind:
    """What kind of model a file with these tensor names (in any layout) is."""
    names = list(names)
    text = "\n" + "\n".join(names) + "\n"
    for kind, fragments in FINGERPRINTS:
        if all(fragment in text for fragment in fragments):
            return kind
    return FileKind("unknown", f"no known model ({some_names(names, 'tensor')})", NOT_OURS)
