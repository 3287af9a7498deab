"""What a real ComfyUI is asked for: one workflow per sampler, resumable, and FramePack's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lowvram_video.wanvideo.network.model import WanModel
from safetensors.torch import save_file

from ..comfyui.model_files import FRAMEPACK as FRAMEPACK_FILE
from ..comfyui.server import Graph
from ..comfyui.tiny_files import FRAMEPACK, PLAIN, _as_kijai, _axes
from ..tiny import randomize
from ..tiny_framepack import make_tensors

SAMPLERS = ("euler", "uni_pc", "dpmpp_2m", "dpmpp_sde", "lcm", "res_multistep")
HIGH, LOW = "high.safetensors", "low.safetensors"


def make_models(base: Path) -> None:
    """The files that the graphs name, in ComfyUI's folders."""
    for folder in ("diffusion_models", "vae", "text_encoders", "clip_vision", "loras"):
        (base / "models" / folder).mkdir(parents=True)
    models = base / "models" / "diffusion_models"
    for name, seed, layers in ((HIGH, 0, 4), (LOW, 5, 6)):
        tensors = randomize(WanModel(replace(PLAIN, num_layers=layers)), seed).state_dict()
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, models / name)
    packed = {name: _as_kijai(name, tensor).contiguous() for name, tensor in make_tensors(FRAMEPACK).items()}
    save_file(packed, models / FRAMEPACK_FILE.name, _axes(FRAMEPACK))


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def wan(name: str, seed: int, steps: int = 6, model: str = HIGH, kill_at: int = 0, resumable: bool = True) -> Graph:
    """A video's latents by KSampler, saved as `latents/NAME`; `name` begins with the sampler's."""
    graph = _loaded(model, kill_at, resumable)
    sampler = name.partition("-")[0]
    settings = {
        "seed": seed,
        "steps": steps,
        "cfg": 3.0,
        "sampler_name": sampler,
        "scheduler": "simple",
        "denoise": 1.0,
    }
    prompts = {"positive": ["3", 0], "negative": ["4", 0], "latent_image": ["5", 0]}
    graph["6"] = node("KSampler", model=["model", 0], **prompts, **settings)
    graph["9"] = node("SaveLatent", samples=["6", 0], filename_prefix=f"latents/{name}")
    return graph


def two_experts(name: str, seed: int, kill_at: int = 0, resumable: bool = True) -> Graph:
    """The same by two models in turn, of three steps each."""
    graph = _loaded(HIGH, kill_at, resumable)
    graph |= {f"low {key}": value for key, value in _loaded(LOW, 0, resumable).items() if key in ("1", "model")}
    graph["low model"]["inputs"]["model"] = ["low 1", 0]
    prompts = {"positive": ["3", 0], "negative": ["4", 0]}
    settings = {"noise_seed": seed, "steps": 6, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple"}
    for key, model, latent, steps in (("6", "model", ["5", 0], (0, 3)), ("7", "low model", ["6", 0], (3, 99))):
        more = {"add_noise": "enable" if key == "6" else "disable", "start_at_step": steps[0], "end_at_step": steps[1]}
        more["return_with_leftover_noise"] = "enable" if key == "6" else "disable"
        graph[key] = node("KSamplerAdvanced", model=[model, 0], latent_image=latent, **prompts, **settings, **more)
    graph["9"] = node("SaveLatent", samples=["7", 0], filename_prefix=f"latents/{name}")
    return graph


def _loaded(model: str, kill_at: int, resumable: bool) -> Graph:
    loader = {"model_name": model, "compute_dtype": "auto", "attention_mode": "auto", "quantization": "none"}
    graph = {
        "1": node("LowVRAMLoadWanModel", **loader),
        "2": node("TestKillAt", model=["1", 0], at=kill_at),
        "model": node("LowVRAMResumableSampling", model=["2", 0]),
        "3": node("TestConditioning", seed=1),
        "4": node("TestConditioning", seed=2),
        "5": node("EmptyHunyuanLatentVideo", width=64, height=64, length=5, batch_size=1),
    }
    if not resumable:
        graph["model"] = node("TestKillAt", model=["1", 0], at=0)
    return graph


def framepack(
    name: str, seed: int, steps: int = 3, seconds: float = 1.0, kill_at: int = 0, resume: bool = True
) -> Graph:
    """Three sections' latents by FramePack Sampler."""
    sampler = {
        "total_second_length": seconds, "latent_window_size": 2, "steps": steps, "cfg": 1.0, "guidance_scale": 10.0,
        "shift": 0.0, "seed": seed, "use_teacache": False, "teacache_rel_l1_thresh": 0.15, "sampler": "unipc_bh1",
        "gpu_memory_preservation": 0.0, "denoise_strength": 1.0, "cfg_rescale": 0.0, "width": 64, "height": 64,
        "one_frame_index": 0, "resume": resume, "filename_prefix": f"video/{name}", "image_embed_strength": 1.0,
    }  # fmt: skip
    loader = {"model_type": "auto", "compute_dtype": "auto", "attention_mode": "auto", "quantization": "none"}
    return {
        "1": node("LowVRAMLoadFramePackModel", model_name=FRAMEPACK_FILE.name, **loader),
        "model": node("TestKillAt", model=["1", 0], at=kill_at),
        "2": node("TestTextEncoder", pooled=True),
        "3": node("CLIPTextEncode", clip=["2", 0], text="a girl dances"),
        "8": node("LowVRAMFramePackSampler", model=["model", 0], positive=["3", 0], **sampler),
        "9": node("SaveLatent", samples=["8", 0], filename_prefix=f"latents/{name}"),
    }
