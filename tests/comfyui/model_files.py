"""The downloads of the example workflows on Hugging Face: Comfy-Org's repackaged files, and FramePack's."""

from __future__ import annotations

from .graph import ModelFile

HUB = "https://huggingface.co/Comfy-Org"
WAN21 = f"{HUB}/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
WAN22 = f"{HUB}/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"
HUNYUAN = f"{HUB}/HunyuanVideo_repackaged/resolve/main/split_files"


def _file(repository: str, directory: str, name: str, place: str = "") -> ModelFile:
    """`place` is the kind of models folder, where it is not the directory there."""
    return ModelFile(name, f"{repository}/{directory}/{name}", place or directory)


T2V_SMALL = _file(WAN21, "diffusion_models", "wan2.1_t2v_1.3B_fp16.safetensors")
I2V_480P = _file(WAN21, "diffusion_models", "wan2.1_i2v_480p_14B_fp8_scaled.safetensors")
FLF2V = _file(WAN21, "diffusion_models", "wan2.1_flf2v_720p_14B_fp8_e4m3fn.safetensors")
VACE_SMALL = _file(WAN21, "diffusion_models", "wan2.1_vace_1.3B_fp16.safetensors")
TI2V = _file(WAN22, "diffusion_models", "wan2.2_ti2v_5B_fp16.safetensors")
T2V_HIGH = _file(WAN22, "diffusion_models", "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors")
T2V_LOW = _file(WAN22, "diffusion_models", "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors")
I2V_HIGH = _file(WAN22, "diffusion_models", "wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors")
I2V_LOW = _file(WAN22, "diffusion_models", "wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors")
T2V_LORA_HIGH = _file(WAN22, "loras", "wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors")
T2V_LORA_LOW = _file(WAN22, "loras", "wan2.2_t2v_lightx2v_4steps_lora_v1.1_low_noise.safetensors")
I2V_LORA_HIGH = _file(WAN22, "loras", "wan2.2_i2v_lightx2v_4steps_lora_v1_high_noise.safetensors")
I2V_LORA_LOW = _file(WAN22, "loras", "wan2.2_i2v_lightx2v_4steps_lora_v1_low_noise.safetensors")
TEXT_ENCODER = _file(WAN21, "text_encoders", "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
CLIP_VISION = _file(WAN21, "clip_vision", "clip_vision_h.safetensors")
VAE_21 = _file(WAN21, "vae", "wan_2.1_vae.safetensors")
VAE_22 = _file(WAN22, "vae", "wan2.2_vae.safetensors")

FRAMEPACK = _file(
    "https://huggingface.co/Kijai/HunyuanVideo_comfy/resolve",
    "main",
    "FramePackI2V_HY_fp8_e4m3fn.safetensors",
    "diffusion_models",
)
FRAMEPACK_F1 = _file(
    "https://huggingface.co/kabachuha/FramePack_F1_I2V_HY_20250503_comfy/resolve",
    "main",
    "FramePack_F1_I2V_HY_20250503_fp8_e4m3fn.safetensors",
    "diffusion_models",
)
# of no single place: a search instead of a download
FRAMEPACK_GGUF = ModelFile(
    "FramePackI2V_HY-Q4_K_M.gguf", "https://huggingface.co/models?search=framepack+gguf", "diffusion_models"
)
LLAVA = _file(HUNYUAN, "text_encoders", "llava_llama3_fp8_scaled.safetensors")
CLIP_L = _file(HUNYUAN, "text_encoders", "clip_l.safetensors")
SIGCLIP = _file(f"{HUB}/sigclip_vision_384/resolve", "main", "sigclip_vision_patch14_384.safetensors", "clip_vision")
HUNYUAN_VAE = _file(HUNYUAN, "vae", "hunyuan_video_vae_bf16.safetensors")

FLASHVSR_HUB = "https://huggingface.co/1038lab/FlashVSR/resolve"
FLASHVSR = _file(FLASHVSR_HUB, "main", "FlashVSR1_1.safetensors", "diffusion_models")
# beside the model
FLASHVSR_PARTS = tuple(
    _file(FLASHVSR_HUB, "main", f"{name}.safetensors", "diffusion_models")
    for name in ("LQ_proj_in", "TCDecoder", "Prompt")
)

# on the disk, in GB
SIZES: dict[ModelFile, float] = {
    T2V_SMALL: 2.8,
    I2V_480P: 16.4,
    FLF2V: 16.4,
    VACE_SMALL: 4.3,
    TI2V: 10.0,
    T2V_HIGH: 14.3,
    T2V_LOW: 14.3,
    I2V_HIGH: 14.3,
    I2V_LOW: 14.3,
    T2V_LORA_HIGH: 1.2,
    T2V_LORA_LOW: 1.2,
    I2V_LORA_HIGH: 1.2,
    I2V_LORA_LOW: 1.2,
    TEXT_ENCODER: 6.7,
    CLIP_VISION: 1.3,
    VAE_21: 0.25,
    VAE_22: 1.4,
    FRAMEPACK: 16.3,
    FRAMEPACK_F1: 16.3,
    FRAMEPACK_GGUF: 7.8,
    LLAVA: 9.1,
    CLIP_L: 0.25,
    SIGCLIP: 0.86,
    HUNYUAN_VAE: 0.49,
}
