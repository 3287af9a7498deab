"""Examples that `--help` ends with: by command, each with what it is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

PROGRAM = "lowvram-video"

EXAMPLES: Mapping[str, Sequence[tuple[str, str]]] = MappingProxyType(
    {
        "": (
            ("a video from the pack's own tiny model: nothing to download", "demo"),
            ("what this machine can do, and how to mend the rest", "doctor"),
            ("what a file is", "inspect wan2.1_t2v_14B_fp8_e4m3fn.safetensors"),
            ("what a run would take", "plan wan2.1_t2v_14B_fp8_e4m3fn.safetensors --vram-budget 8"),
            ("the flags of a command, with examples", "generate --help"),
        ),
        "generate": (
            (
                "Wan from text, within 6 GiB of VRAM",
                "generate --model wan2.1_t2v_14B_fp8_e4m3fn.safetensors "
                "--text-encoder umt5_xxl_fp8_e4m3fn_scaled.safetensors --vae wan_2.1_vae.safetensors "
                '--prompt "a cat surfs a wave at sunset" --vram-budget 6',
            ),
            (
                "Wan 2.2 A14B: two experts, each with its 4-step LoRA",
                "generate --model wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors "
                "--model-low wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors --lora high_4steps.safetensors "
                "--lora-low low_4steps.safetensors --text-encoder umt5_xxl_fp8_e4m3fn_scaled.safetensors "
                '--vae wan_2.1_vae.safetensors --prompt "rain on a street at night" --steps 4 --guidance 1 --shift 5',
            ),
            (
                "FramePack from a picture, ten seconds",
                "generate --model FramePackI2V_HY_fp8_e4m3fn.safetensors "
                "--text-encoder llava_llama3_fp8_scaled.safetensors --clip-l clip_l.safetensors "
                "--clip-vision sigclip_vision_patch14_384.safetensors --vae hunyuan_video_vae_bf16.safetensors "
                '--image girl.png --prompt "a woman dances [5s: she bows]" --seconds 10',
            ),
        ),
        "batch": (
            ("a job a line, on all cards of this machine", "batch jobs.jsonl"),
            ("on a Ray cluster, also where some jobs are refused", "batch jobs.jsonl --ray auto --keep-going"),
            (
                "an example workflow with each job's values, on two ComfyUI servers",
                "batch jobs.jsonl --workflow wan2.1_t2v_1.3B --comfyui http://192.168.1.20:8188 "
                "http://192.168.1.21:8188",
            ),
        ),
        "cache": (
            ("what there is, and where", "cache"),
            ("delete it: code is made anew when it is wanted", "cache --clear"),
        ),
        "upscale": (
            (
                "twice as large within 6 GiB; LQ_proj_in, TCDecoder and Prompt lie beside the model",
                "upscale clip.mp4 --model models/FlashVSR/FlashVSR1_1.safetensors --vram-budget 6",
            ),
            (
                "four times, with sharper details",
                "upscale clip.mp4 --model models/FlashVSR/FlashVSR1_1.safetensors --scale 4 --local-range 9 "
                "-o large.mp4",
            ),
        ),
        "plan": (
            ("81 frames of 832x480 within 8 GiB", "plan wan2.1_t2v_14B_fp8_e4m3fn.safetensors --vram-budget 8"),
            (
                "a larger video without guidance, on a machine without Triton",
                "plan wan2.1_t2v_14B_fp8_e4m3fn.safetensors --vram-budget 11.5 --width 1280 --height 720 --cfg-1 "
                "--no-triton",
            ),
            (
                "with the times of somebody else's card",
                "plan FramePackI2V_HY_fp8_e4m3fn.safetensors --vram-budget 6 --card benchmarks/cards/nvidia-h200.json",
            ),
        ),
        "bench": (
            ("this card and the disk that the models are on", "bench --models ComfyUI/models"),
            ("a minute, and files to share", "bench --quick -o my_card.json"),
        ),
        "calibrate": (
            (
                "a table beside the model's file, of three videos as long as yours",
                "calibrate --model wan2.1_t2v_14B_fp8_e4m3fn.safetensors "
                "--text-encoder umt5_xxl_fp8_e4m3fn_scaled.safetensors --vae wan_2.1_vae.safetensors --steps 30",
            ),
        ),
        "doctor": (
            ("a table with a command below each fault", "doctor --models ComfyUI/models"),
            ("a file for a bug report", "doctor --report doctor.json"),
        ),
        "inspect": (
            ("a checkpoint, LoRA, encoder or VAE", "inspect wan_2.1_vae.safetensors"),
            ("a GGUF", "inspect wan2.1-t2v-14b-Q4_K_M.gguf"),
        ),
        "convert": (
            ("half the size, for ComfyUI too", "convert wan_bf16.safetensors wan_fp8.safetensors --to fp8"),
            ("8 bits with less error", "convert wan_bf16.safetensors wan_int8.safetensors --to int8"),
        ),
        "demo": (
            ("on the CPU, into output/demo.mp4", "demo"),
            ("on the GPU, to a file of your own", "demo --device cuda -o balls.mp4"),
        ),
    }
)


def examples_of(command: str) -> str:
    """The examples of a command ("": of the program) as its help shows them; "" where there are none."""
    lines = [f"  # {about}\n  {PROGRAM} {words}" for about, words in EXAMPLES.get(command, ())]
    return "\n".join(["examples:", *lines]) if lines else ""
