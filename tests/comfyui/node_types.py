"""The nodes that the example workflows use: sockets, widgets in order, outputs, as ComfyUI 0.8.0 and later have them.

`test_workflows.py` holds this table against the servers' /object_info.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Widget:
    """`followed_by` are entries that the browser adds: a seed's mode, an upload button."""

    name: str
    default: Any
    kind: str
    followed_by: tuple[Any, ...] = ()
    multiline: bool = False


@dataclass(frozen=True)
class NodeType:
    sockets: tuple[tuple[str, str], ...]
    widgets: tuple[Widget, ...]
    outputs: tuple[tuple[str, str], ...]
    optional: tuple[str, ...] = ()
    extra_width: int = 0
    extra_height: int = 0
    colour: tuple[str, str] | None = None


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """ "model:MODEL latent_image:LATENT" as pairs; a bare TYPE is its own name."""
    return tuple((part.split(":")[0], part.split(":")[-1]) for part in text.split())


def _widgets(values: dict[str, Any]) -> tuple[Widget, ...]:
    kinds: dict[type, str] = {bool: "BOOLEAN", int: "INT", float: "FLOAT", str: "COMBO"}
    return tuple(
        value if isinstance(value, Widget) else Widget(name, value, kinds[type(value)])
        for name, value in values.items()
    )


def _kind(sockets: str, widgets: dict[str, Any], outputs: str, **more: Any) -> NodeType:
    return NodeType(_pairs(sockets), _widgets(widgets), _pairs(outputs), **more)


def _seed(name: str) -> Widget:
    return Widget(name, 0, "INT", ("randomize",))


VIDEO_SIZE = {"width": 832, "height": 480, "length": 81, "batch_size": 1}
SAMPLER = "model:MODEL positive:CONDITIONING negative:CONDITIONING latent_image:LATENT"
CONDITIONED = "positive:CONDITIONING negative:CONDITIONING vae:VAE"
PROMPTS = "positive:CONDITIONING negative:CONDITIONING latent:LATENT"
COMPUTE = {"compute_dtype": "auto", "attention_mode": "auto", "quantization": "none"}

NODE_TYPES: dict[str, NodeType] = {
    # ours
    "LowVRAMLoadWanModel": _kind(
        "",
        {"model_name": "", **COMPUTE, "vace_module": "none"},
        "MODEL",
        extra_width=100,
    ),
    "LowVRAMLoadFramePackModel": _kind(
        "", {"model_name": "", "model_type": "auto", **COMPUTE}, "MODEL", extra_width=100
    ),
    "LowVRAMFramePackSampler": _kind(
        "model:MODEL positive:CONDITIONING negative:CONDITIONING start_latent:LATENT image_embeds:CLIP_VISION_OUTPUT "
        "end_image:LOWVRAM_END_IMAGE initial_samples:LATENT extend_samples:LATENT vae:VAE",
        {
            "total_second_length": 5.0,
            "latent_window_size": 9,
            "steps": 25,
            "cfg": 1.0,
            "guidance_scale": 10.0,
            "shift": 0.0,
            "seed": _seed("seed"),
            "use_teacache": True,
            "teacache_rel_l1_thresh": 0.15,
            "gpu_memory_preservation": 0.0,
            "sampler": "unipc_bh1",
            "denoise_strength": 1.0,
            "cfg_rescale": 0.0,
            "width": 640,
            "height": 608,
            "one_frame_index": 0,
            "resume": True,
            "filename_prefix": Widget("filename_prefix", "video/FramePack", "STRING"),
            "image_embed_strength": 1.0,
        },
        "samples:LATENT video:VIDEO",
        optional=(
            "negative",
            "start_latent",
            "image_embeds",
            "end_image",
            "initial_samples",
            "extend_samples",
            "vae",
        ),
        extra_width=160,
        extra_height=520,
    ),
    "LowVRAMFramePackNearestBucket": _kind("image:IMAGE", {"base_resolution": 640}, "width:INT height:INT"),
    "LowVRAMFramePackTimedPrompt": _kind(
        "clip:CLIP",
        {"text": Widget("text", "", "STRING", multiline=True), "cross_fade": 0.0},
        "CONDITIONING",
        extra_width=60,
    ),
    "LowVRAMFramePackEndImage": _kind(
        "latent:LATENT image_embeds:CLIP_VISION_OUTPUT",
        {"embed_interpolation": "linear", "start_embed_strength": 1.0},
        "end_image:LOWVRAM_END_IMAGE",
        optional=("latent", "image_embeds"),
    ),
    "LowVRAMTorchCompile": _kind(
        "model:MODEL",
        {
            "backend": "inductor",
            "fullgraph": False,
            "mode": "default",
            "dynamic": "auto",
            "compile_transformer_blocks_only": True,
            "dynamo_cache_size_limit": 64,
            "dynamo_recompile_limit": 128,
            "force_parameter_static_shapes": False,
            "profile": "custom",
        },
        "MODEL",
    ),
    "LowVRAMLoadLora": _kind("model:MODEL", {"lora_name": "", "strength": 1.0}, "MODEL", extra_width=100),
    "LowVRAMNag": _kind(
        "model:MODEL negative:CONDITIONING", {"nag_scale": 5.0, "nag_tau": 2.5, "nag_alpha": 0.25}, "MODEL"
    ),
    "LowVRAMSparseAttention": _kind(
        "model:MODEL",
        {
            "mode": "balanced",
            "value": 1.0,
            "error_bound": -1.0,
            "dense_percent": 25.0,
            "dense_layers": 1,
            "min_tokens": 12000,
        },
        "MODEL",
    ),
    "LowVRAMStepCache": _kind(
        "model:MODEL",
        {
            "method": "teacache",
            "threshold": 0.0,
            "start_percent": 0.15,
            "end_percent": 0.95,
            "max_skips": 0,
            "table": "auto",
            "residuals": "auto",
        },
        "MODEL",
    ),
    "LowVRAMSeveralGPUs": _kind("model:MODEL", {"devices": "auto", "mode": "auto", "park": ""}, "MODEL"),
    "LowVRAMResumableSampling": _kind("model:MODEL", {}, "MODEL"),
    "LowVRAMLoadClipGGUF": _kind("", {"clip_name": "", "device": "default"}, "CLIP", extra_width=100),
    "LowVRAMLoadDemo": _kind("", {}, "MODEL CLIP VAE"),
    "LowVRAMBlockSwap": _kind(
        "model:MODEL",
        {
            "blocks_to_swap": -1,
            "vram_budget_gb": 0.0,
            "prefetch": 0,
            "ram_budget_gb": 0.0,
            "pinned_memory": True,
            "pass_other_models": False,
        },
        "MODEL",
    ),
    "LowVRAMPlan": _kind(
        "model:MODEL",
        {"width": 832, "height": 480, "length": 81, "guidance": True, "card_gb": 0.0},
        "MODEL plan:STRING",
        extra_width=160,
        extra_height=130,
    ),
    "LowVRAMMemoryReport": _kind(
        "model:MODEL after:*",
        {},
        "report:STRING timeline:IMAGE",
        optional=("after",),
        extra_width=160,
        extra_height=310,
    ),
    "LowVRAMDoctor": _kind(
        "", {"read_disk": False, "save_report": False}, "report:STRING", extra_width=560, extra_height=440
    ),
    "LowVRAMDecodeVideo": _kind(
        "samples:LATENT vae:VAE", {"tile_size": 0, "temporal_chunk": 0, "keep_latent": True}, "IMAGE"
    ),
    "LowVRAMSaveVideo": _kind(
        "samples:LATENT vae:VAE audio:AUDIO",
        {
            "filename_prefix": Widget("filename_prefix", "video/LowVRAM", "STRING"),
            "fps": 16.0,
            "codec": "H.264",
            "crf": 16,
            "tile_size": 0,
            "keep_latent": True,
        },
        "video:VIDEO",
        optional=("audio",),
        extra_width=60,
        extra_height=320,
    ),
    "LowVRAMLoadFlashVSRModel": _kind(
        "",
        {
            "model_name": "",
            "version": "1.1",
            "projection": "beside the model",
            "decoder": "beside the model",
            "prompt": "beside the model",
            **COMPUTE,
            "lora_name": "none",
            "lora_strength": 1.0,
        },
        "flashvsr:LOWVRAM_FLASHVSR",
        extra_width=160,
    ),
    "LowVRAMUpscaleVideo": _kind(
        "flashvsr:LOWVRAM_FLASHVSR video:VIDEO images:IMAGE audio:AUDIO",
        {
            "scale": "2",
            "seed": Widget("seed", 0, "INT", ("fixed",)),
            "vram_budget_gb": 0.0,
            "fps": 16.0,
            "filename_prefix": Widget("filename_prefix", "video/Upscaled", "STRING"),
            "crf": 16,
            "resume": True,
            "colour": "adain",
            "sparse_ratio": 2.0,
            "local_range": "11",
            "kept_windows": 3,
        },
        "video:VIDEO",
        optional=("video", "images", "audio"),
        extra_width=60,
        extra_height=300,
    ),
    "LowVRAMShowVideo": _kind("video:VIDEO", {}, "video:VIDEO", extra_width=60, extra_height=400),
    "LowVRAMEncodeVideo": _kind("pixels:IMAGE vae:VAE", {"tile_size": 0}, "samples:LATENT"),
    # ComfyUI's
    "CLIPLoader": _kind("", {"clip_name": "", "type": "wan", "device": "default"}, "CLIP", extra_width=100),
    "DualCLIPLoader": _kind(
        "", {"clip_name1": "", "clip_name2": "", "type": "hunyuan_video", "device": "default"}, "CLIP", extra_width=100
    ),
    "VAELoader": _kind("", {"vae_name": ""}, "VAE", extra_width=100),
    "CLIPVisionLoader": _kind("", {"clip_name": ""}, "CLIP_VISION", extra_width=100),
    "LoraLoaderModelOnly": _kind("model:MODEL", {"lora_name": "", "strength_model": 1.0}, "MODEL", extra_width=100),
    "CLIPTextEncode": _kind(
        "clip:CLIP", {"text": Widget("text", "", "STRING", multiline=True)}, "CONDITIONING", extra_width=60
    ),
    "CLIPVisionEncode": _kind("clip_vision:CLIP_VISION image:IMAGE", {"crop": "none"}, "CLIP_VISION_OUTPUT"),
    "LoadImage": _kind(
        "", {"image": Widget("image", "example.png", "COMBO", ("image",))}, "IMAGE MASK", extra_height=260
    ),
    "LoadVideo": _kind("", {"file": Widget("file", "example.mp4", "COMBO", ("image",))}, "VIDEO", extra_height=320),
    "GetVideoComponents": _kind("video:VIDEO", {}, "images:IMAGE audio:AUDIO fps:FLOAT"),
    "ImageFromBatch": _kind("image:IMAGE", {"batch_index": 0, "length": 1}, "IMAGE"),
    "ImageScale": _kind(
        "image:IMAGE", {"upscale_method": "lanczos", "width": 640, "height": 608, "crop": "center"}, "IMAGE"
    ),
    "VAEEncode": _kind("pixels:IMAGE vae:VAE", {}, "LATENT"),
    "PrimitiveInt": _kind("", {"value": Widget("value", 0, "INT", ("fixed",))}, "INT"),
    "EmptyHunyuanLatentVideo": _kind("", VIDEO_SIZE, "LATENT"),
    "WanImageToVideo": _kind(
        f"{CONDITIONED} clip_vision_output:CLIP_VISION_OUTPUT start_image:IMAGE",
        VIDEO_SIZE,
        PROMPTS,
        optional=("clip_vision_output", "start_image"),
    ),
    "WanFirstLastFrameToVideo": _kind(
        f"{CONDITIONED} clip_vision_start_image:CLIP_VISION_OUTPUT clip_vision_end_image:CLIP_VISION_OUTPUT "
        "start_image:IMAGE end_image:IMAGE",
        VIDEO_SIZE,
        PROMPTS,
        optional=("clip_vision_start_image", "clip_vision_end_image", "start_image", "end_image"),
    ),
    "Wan22ImageToVideoLatent": _kind(
        "vae:VAE start_image:IMAGE",
        {"width": 1280, "height": 704, "length": 121, "batch_size": 1},
        "LATENT",
        optional=("start_image",),
    ),
    "WanVaceToVideo": _kind(
        f"{CONDITIONED} control_video:IMAGE control_masks:MASK reference_image:IMAGE",
        {**VIDEO_SIZE, "strength": 1.0},
        f"{PROMPTS} trim_latent:INT",
        optional=("control_video", "control_masks", "reference_image"),
    ),
    "TrimVideoLatent": _kind("samples:LATENT", {"trim_amount": 0}, "LATENT"),
    "ModelSamplingSD3": _kind("model:MODEL", {"shift": 5.0}, "MODEL"),
    "KSampler": _kind(
        SAMPLER,
        {
            "seed": _seed("seed"),
            "steps": 20,
            "cfg": 5.0,
            "sampler_name": "uni_pc",
            "scheduler": "simple",
            "denoise": 1.0,
        },
        "LATENT",
    ),
    "KSamplerAdvanced": _kind(
        SAMPLER,
        {
            "add_noise": "enable",
            "noise_seed": _seed("noise_seed"),
            "steps": 4,
            "cfg": 1.0,
            "sampler_name": "euler",
            "scheduler": "simple",
            "start_at_step": 0,
            "end_at_step": 10000,
            "return_with_leftover_noise": "disable",
        },
        "LATENT",
    ),
    "CreateVideo": _kind(
        "images:IMAGE audio:AUDIO",
        {"fps": 16.0},
        "VIDEO",
        optional=("audio",),
        extra_height=40,  # newer ComfyUIs have a widget more
    ),
    "SaveVideo": _kind(
        "video:VIDEO",
        {
            "filename_prefix": Widget("filename_prefix", "video/LowVRAM", "STRING"),
            "format": "auto",
            "codec": "auto",
        },
        "",
        extra_width=60,
        extra_height=480,
    ),
    "MarkdownNote": _kind(
        "", {"text": Widget("text", "", "STRING", multiline=True)}, "", colour=("#322c24", "#25211b")
    ),
}
