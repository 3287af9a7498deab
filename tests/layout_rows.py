"""Every layout of model files that we know: who writes it, a tiny file of it, and what we do with it.

docs/layouts.md shows this table (`python -m tests.layout_rows` writes it there); tests/test_layouts.py runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .layout_files import (
    Made,
    Make,
    converted_pickle,
    file,
    gguf_file,
    llama_cpp_umt5,
    module_alone,
    module_beside,
    official_umt5,
    official_vae,
    pickle,
    prefixed,
    shards,
    to_diffusers,
    without,
)
from .layout_forms import (
    E4M3,
    E5M2,
    Stored,
    cast,
    foreign,
    quanto,
    scaled,
    with_extra,
    with_header,
    with_old_marker,
)
from .layout_models import spiece


@dataclass(frozen=True)
class Row:
    """A line of the table. With `refusal`, a pattern of the message, it is refused; `way_out` is what loads instead."""

    model: str
    layout: str
    written_by: str
    make: Make
    does: str = "loads"
    refusal: str = ""
    way_out: Make | None = None


BF16, FP32, PLAIN = cast(torch.bfloat16), cast(torch.float32), file(cast(torch.float32))
FP8 = scaled(E4M3)
OTHERS = {
    "vae.decoder.conv1.weight": torch.ones(4, 4),
    "text_encoders.umt5xxl.transformer.shared.weight": torch.ones(4, 4),
}
E = torch.ones
VARIANT = "is not supported by this loader yet; .*choose one of those files"
NOT_UNPACKED = "not unpacked here; .*choose the fp8 scaled or a GGUF version"
INT8_MARKER = {"format": "int8_tensorwise"}
KITCHEN = "needs the package comfy-kitchen|scale"


def variant(layout: str, name: str, tensor: Tensor, title: str) -> Row:
    return Row(
        "t2v", layout, "their releases", file(with_extra(FP32, {name: tensor})), f"refused: {title}", VARIANT, PLAIN
    )


def stored_by(layout: str, written_by: str, *leaves: str) -> Row:
    return Row("t2v", layout, written_by, file(foreign(*leaves)), "refused by name", NOT_UNPACKED, file(FP8))


WAN_ROWS = (
    Row("t2v", "official names, bf16", "Wan-AI, Kijai", file(BF16)),
    Row(
        "t2v",
        "`model.diffusion_model.` and other models",
        "ComfyUI checkpoints",
        file(BF16, prefixed("model.diffusion_model."), OTHERS),
    ),
    Row("t2v", "`diffusion_model.`", "ComfyUI's ModelSave", file(BF16, prefixed("diffusion_model."))),
    Row("t2v", "`model.`", "DiffSynth-Studio", file(BF16, prefixed("model."))),
    Row("t2v", "`pipe.dit.`", "DiffSynth-Studio, full training", file(BF16, prefixed("pipe.dit."))),
    Row("t2v", "`module.`", "data-parallel training", file(BF16, prefixed("module."))),
    Row("t2v", "`_orig_mod.`", "torch.compile'd training", file(BF16, prefixed("_orig_mod."))),
    Row("t2v", "shards and index", "Wan-AI", shards(BF16)),
    Row("t2v", "diffusers names, shards", "diffusers", shards(BF16, to_diffusers("t2v"))),
    Row("i2v", "diffusers names, CLIP vision", "diffusers", file(BF16, to_diffusers("i2v"))),
    Row("i2v 2.2", "36 channels, no CLIP vision", "Wan-AI", file(BF16)),
    Row("ti2v", "48 channels", "Wan-AI", file(BF16)),
    Row("vace", "VACE, official names", "ali-vilab", file(BF16)),
    Row("vace", "VACE, diffusers names", "diffusers", file(BF16, to_diffusers("vace"))),
    Row("vace", "VACE module beside its base", "Kijai", module_beside, "loads: `vace_module`, `--vace-module`"),
    Row(
        "vace",
        "VACE module alone",
        "Kijai",
        module_alone,
        "refused: load it beside its base",
        "a Wan VACE module.*load it as the VACE module",
        module_beside,
    ),
    Row(
        "t2v",
        "marker `model_type.…`",
        "Kijai",
        file(with_extra(BF16, {"model_type.Wan2_1-T2V-14B": E(1)})),
        "loads without it",
    ),
    Row("t2v", "patch_embedding `[dim, 64]`", "conversions", file(lambda t, n: flat_patches(BF16(t, n)))),
    Row("t2v", "fp8 e4m3fn, cast", "Kijai", file(cast(E4M3, linear_only=True))),
    Row("t2v", "fp8 e5m2, cast", "Kijai", file(cast(E5M2, linear_only=True))),
    Row("t2v", "`scale_weight`, `scaled_fp8`", "Kijai", file(with_old_marker(scaled(E4M3, "scale_weight")))),
    Row(
        "t2v",
        "`scale_weight`, `scale_input`",
        "Comfy-Org, 2025",
        file(
            with_old_marker(scaled(E4M3, "scale_weight", beside={"scale_input": E(1)}), 2),
            prefixed("model.diffusion_model."),
        ),
    ),
    Row(
        "t2v",
        "`comfy_quant` fp8",
        "Comfy-Org",
        file(scaled(E4M3, marker={"format": "float8_e4m3fn"}, beside={"input_scale": E(1)})),
    ),
    Row("t2v", "`_quantization_metadata` fp8", "Comfy-Org", file(with_header(FP8, "float8_e4m3fn"))),
    Row("t2v", "fp8, `weight_scale` per row", "LightX2V", file(scaled(E4M3, rows=True))),
    Row(
        "t2v",
        "fp8, `scale_weight [out, n, 1]`",
        "musubi-tuner",
        file(with_old_marker(scaled(E4M3, "scale_weight", block=(1, 64)))),
    ),
    Row(
        "t2v",
        "fp8, `weight_scale_inv` 128 x 128",
        "DeepSeek's way",
        file(scaled(E4M3, "weight_scale_inv", block=(128, 128))),
    ),
    Row("t2v", "int8, `weight_scale` per row", "LightX2V", file(scaled(torch.int8, rows=True))),
    Row("t2v", "`comfy_quant` int8", "Comfy-Org", file(scaled(torch.int8, rows=True, marker=INT8_MARKER))),
    Row(
        "t2v",
        "`comfy_quant` int8, ConvRot",
        "Comfy-Org",
        file(
            scaled(torch.int8, rows=True, rotation=16, marker={**INT8_MARKER, "convrot": True, "convrot_groupsize": 16})
        ),
    ),
    Row("t2v", "quanto int8, `weight._data`", "Wan2GP", file(quanto)),
    Row("t2v", "GGUF F16", "city96", gguf_file("F16")),
    Row("t2v", "GGUF Q8_0", "city96, QuantStack", gguf_file("Q8_0")),
    Row("t2v", "GGUF Q4_K", "city96, QuantStack", gguf_file("Q4_K")),
    Row("t2v", "GGUF, convolutions flat", "diffusion-to-gguf", gguf_file("Q8_0", flat=True)),
    Row("vace", "GGUF VACE, diffusers names", "diffusion-to-gguf", gguf_file("Q8_0", to_diffusers("vace"), flat=True)),
    Row(
        "t2v",
        "GGUF without patch_embedding",
        "city96's tool before its fix",
        gguf_file("Q8_0", without="patch_embedding.weight"),
        "refused by name",
        "GGUF tools leave out.*choose another release",
        gguf_file("Q8_0"),
    ),
    Row(
        "t2v",
        "GGUF in parts",
        "gguf-split",
        gguf_file("Q8_0", **{"split.count": 2}),
        "refused: join them",
        "one of 2 parts.*--merge",
        gguf_file("Q8_0"),
    ),
    stored_by("SVDQuant `qweight`, `wscales`", "Nunchaku", "qweight", "wscales", "smooth_factor"),
    stored_by("NF4 `weight.absmax`", "bitsandbytes", "weight", "weight.absmax", "weight.quant_map"),
    stored_by("quanto int4 `weight._shift`", "optimum-quanto", "weight._data", "weight._scale", "weight._shift"),
    stored_by("torchao `weight_qdata`", "torchao", "weight_qdata", "weight_scale"),
    stored_by("NVFP4 `weight_global_scale`", "LightX2V", "weight", "weight_scale", "weight_global_scale"),
    Row(
        "t2v",
        "`.pth`",
        "training",
        pickle,
        "refused: convert it",
        "a PyTorch pickle.*weights_only=True",
        converted_pickle,
    ),
    variant("`fps_embedding`", "fps_embedding.weight", E(2, 256), "SkyReels-V2 Diffusion Forcing"),
    variant("`face_adapter`", "face_adapter.fuser_blocks.0.k_norm.weight", E(4), "Wan 2.2 Animate"),
    variant("`casual_audio_encoder`", "casual_audio_encoder.encoder.final_linear.weight", E(4, 4), "Wan 2.2 S2V"),
    variant("`audio_proj`", "audio_proj.audio_proj_glob_1.layer.bias", E(4), "HuMo, InfiniteTalk"),
    variant("`patch_embedding_pose`", "patch_embedding_pose.weight", E(4, 4), "SCAIL"),
    variant("`cam_encoder`", "blocks.0.cam_encoder.weight", E(256, 12), "ReCamMaster"),
    variant("`dwpose_embedding`", "dwpose_embedding.0.weight", E(4, 4), "UniAnimate"),
    Row(
        "t2v",
        "a block missing",
        "cut conversions",
        file(without("blocks.0.")),
        "refused: download it again",
        "without|missing",
        PLAIN,
    ),
)


def renamed_late(model: str) -> Make:
    """The names are asked for when the file is made, not when the table is read."""
    return lambda kind, folder: file(FP32, official_vae(model))(kind, folder)


def flat_patches(stored: Stored) -> Stored:
    name = "patch_embedding.weight"
    return replace(stored, tensors={**stored.tensors, name: stored.tensors[name].flatten(1)})


FRAMEPACK_ROWS = (
    Row("framepack", "diffusers names, bf16", "Kijai", file(BF16)),
    Row("framepack", "shards and index", "lllyasviel", shards(BF16)),
    Row("framepack", "`model.diffusion_model.`", "ComfyUI checkpoints", file(BF16, prefixed("model.diffusion_model."))),
    Row("framepack", "fp8 e4m3fn, cast", "Kijai", file(cast(E4M3, linear_only=True))),
    Row("framepack", "`scale_weight`, `scaled_fp8`", "Kijai", file(with_old_marker(scaled(E4M3, "scale_weight")))),
    Row(
        "framepack",
        "fp8, `scale_weight [out, n, 1]`",
        "musubi-tuner",
        file(scaled(E4M3, "scale_weight", block=(1, 64))),
    ),
    Row("framepack", "quanto int8", "Wan2GP", file(quanto)),
    Row("framepack", "GGUF Q8_0", "city96's tools", gguf_file("Q8_0")),
    Row("framepack", "GGUF Q8_0, convolutions flat", "city96's tools", gguf_file("Q8_0", flat=True)),
)

UMT5_BLOCKS = prefixed("text_encoders.umt5xxl.transformer.")
ENCODER_ROWS = (
    Row("umt5", "Hugging Face names, `spiece_model`", "Comfy-Org", file(cast(torch.float16))),
    Row("umt5", "official names, spiece.model beside", "Wan-AI, Kijai", file(BF16, official_umt5)),
    Row("umt5", "`text_encoders.…` in a checkpoint", "ComfyUI checkpoints", file(BF16, UMT5_BLOCKS)),
    Row("umt5", "`scale_weight`, `scaled_fp8`", "Comfy-Org", file(with_old_marker(scaled(E4M3, "scale_weight")))),
    Row("umt5", "fp8 per row", "LightX2V", file(scaled(E4M3, rows=True), official_umt5)),
    Row(
        "umt5",
        "fp8 per row, also `shared`",
        "conversions",
        file(lambda t, n: scaled(E4M3, rows=True)(t, n | {"shared.weight"})),
    ),
    Row("umt5", "`comfy_quant` int8", "Comfy-Org", file(scaled(torch.int8, rows=True, marker=INT8_MARKER))),
    Row(
        "umt5",
        "`comfy_quant` int8, ConvRot",
        "Comfy-Org",
        file(
            scaled(torch.int8, rows=True, rotation=64, marker={**INT8_MARKER, "convrot": True, "convrot_groupsize": 64})
        ),
    ),
    Row("umt5", "quanto int8, official names", "Wan2GP", file(quanto, official_umt5)),
    Row("umt5", "fp8 in blocks", "DeepSeek's way", file(scaled(E4M3, "weight_scale_inv", block=(64, 64)))),
    Row("umt5", "GGUF Q8_0, llama.cpp names", "city96", gguf_file("Q8_0", llama_cpp_umt5)),
    Row("umt5", "GGUF F16, llama.cpp names", "city96", gguf_file("F16", llama_cpp_umt5)),
    Row(
        "umt5",
        "one position bias (T5-XXL)",
        "Flux, SD 3",
        file(without("encoder.block.1.layer.0.SelfAttention.relative")),
        "refused: choose umt5-xxl",
        "T5-XXL.*choose a file such as umt5_xxl",
        PLAIN,
    ),
    Row(
        "umt5",
        "`.pth`",
        "Wan-AI",
        pickle,
        "refused: convert it",
        "a PyTorch pickle.*weights_only=True",
        lambda model, folder: with_spiece(converted_pickle(model, folder)),
    ),
    Row("llama", "Hugging Face names", "Hugging Face", file(BF16)),
    Row("llama", "`model.`", "Comfy-Org", file(cast(torch.float16), prefixed("model."))),
    Row("llama", "`language_model.model.`", "xtuner's LLaVA", file(BF16, prefixed("language_model.model."))),
    Row(
        "llama",
        "`scale_weight`, `scaled_fp8`",
        "Comfy-Org",
        file(with_old_marker(scaled(E4M3, "scale_weight")), prefixed("model.")),
    ),
    Row("llama", "`comfy_quant` int8", "Comfy-Org", file(scaled(torch.int8, rows=True, marker=INT8_MARKER))),
    Row("llama", "quanto int8", "Wan2GP", file(quanto)),
    Row("clip", "`text_model.`", "Comfy-Org", file(BF16, prefixed("text_model."))),
    Row(
        "clip",
        "`clip_l.transformer.text_model.`",
        "checkpoints",
        file(BF16, prefixed("clip_l.transformer.text_model.")),
    ),
    Row("clip", "fp8, cast", "Kijai", file(cast(E4M3, linear_only=True), prefixed("text_model."))),
    Row("siglip", "`vision_model.`", "Comfy-Org", file(FP32, prefixed("vision_model."))),
    Row("siglip", "fp16", "Comfy-Org", file(cast(torch.float16), prefixed("vision_model."))),
)

VAE_ROWS = (
    Row("wan vae", "diffusers names", "diffusers", file(FP32)),
    Row("wan vae", "`vae.`, bf16", "ComfyUI checkpoints", file(BF16, prefixed("vae."))),
    Row(
        "wan vae",
        "`first_stage_model.`, fp16",
        "checkpoints",
        file(cast(torch.float16), prefixed("first_stage_model.")),
    ),
    Row("wan 2.2 vae", "diffusers names", "diffusers", file(FP32)),
    Row("wan vae", "official names", "Wan-AI, Comfy-Org", renamed_late("wan vae")),
    Row("wan 2.2 vae", "official names", "Wan-AI, Comfy-Org", renamed_late("wan 2.2 vae")),
    Row("hunyuan vae", "diffusers names", "hunyuanvideo-community", file(FP32)),
    Row("hunyuan vae", "`vae.`, bf16", "checkpoints", file(BF16, prefixed("vae."))),
    Row(
        "wan vae",
        "half of it",
        "decoder-only files",
        file(without("encoder.")),
        "refused: encoder and decoder in one file",
        "expected encoder and decoder in one file. *Download",
        PLAIN,
    ),
)


def with_spiece(made: Made) -> Made:
    (made.path.parent / "spiece.model").write_bytes(spiece())
    return made


SECTIONS: Mapping[str, tuple[Row, ...]] = {
    "Wan transformers": WAN_ROWS,
    "FramePack transformers": FRAMEPACK_ROWS,
    "Text and vision encoders": ENCODER_ROWS,
    "VAEs": VAE_ROWS,
}
ROWS = {f"{row.model}: {row.layout} ({row.written_by})": row for rows in SECTIONS.values() for row in rows}
NAMES = {
    "t2v": "T2V",
    "i2v": "I2V",
    "i2v 2.2": "I2V 2.2",
    "ti2v": "TI2V 5B",
    "vace": "VACE",
    "framepack": "FramePack",
    "umt5": "UMT5-XXL",
    "llama": "LLaMA 3",
    "clip": "CLIP-L",
    "siglip": "SigLIP",
    "wan vae": "Wan 2.1",
    "wan 2.2 vae": "Wan 2.2",
    "hunyuan vae": "HunyuanVideo",
}
PAGE = Path(__file__).resolve().parents[1] / "docs" / "layouts.md"
BEGIN, END = "<!-- models: python -m tests.layout_rows -->", "<!-- end of models -->"


def table() -> str:
    """The sections as docs/layouts.md shows them."""
    lines = []
    for title, rows in SECTIONS.items():
        lines += [f"## {title}", "", "| model | layout | written by | what we do |", "| --- | --- | --- | --- |"]
        lines += [f"| {NAMES[row.model]} | {row.layout} | {row.written_by} | {row.does} |" for row in rows]
        lines.append("")
    return "\n".join([BEGIN, "", *lines, END])


def in_page(page: str) -> str:
    """The page with the table in its place, or at its end."""
    before, found, rest = page.partition(BEGIN)
    if not found:
        return f"{page.rstrip()}\n\n{table()}\n"
    return before + table() + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(in_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
