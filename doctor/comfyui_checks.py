"""ComfyUI's own settings, as far as they change what this package does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .finding import Finding

PART = "ComfyUI"

# Flag -> (what it does here, what to do instead; "" where it is as good as any).
FLAGS: Mapping[str, tuple[str, str]] = {
    "--cpu": ("everything runs on the CPU", "leave it out to use the GPU"),
    "--lowvram": ("every block is streamed, though some could stay on the GPU", "leave it out: the plan is faster"),
    "--novram": ("every block is streamed, though some could stay on the GPU", "leave it out: the plan is faster"),
    "--highvram": ("no block is streamed: what does not fit is an out-of-memory", "leave it out for large models"),
    "--gpu-only": ("text encoders and VAEs stay on the GPU, and what is left is less", "leave it out on small cards"),
    "--disable-pinned-memory": ("weights are copied from pageable memory, at half the speed", "leave it out"),
    "--disable-async-offload": ("ComfyUI's own models are not read ahead; ours are", ""),
    "--cache-none": (
        "every node runs again in each run: models are read again",
        "leave it out, or --cache-lru 4",
    ),
    "--disable-smart-memory": ("models leave the GPU after each run, and are read again", "leave it out"),
    "--cuda-malloc": ("PyTorch's allocator is the driver's: budgets are held less exactly", "--disable-cuda-malloc"),
    "--force-fp32": ("twice the memory", "leave it out"),
    "--fp32-vae": ("decoding takes twice the memory", "leave it out"),
    "--cpu-vae": ("decoding takes minutes", "leave it out: tiles fit any card"),
    "--use-sage-attention": ("is of ComfyUI's own models: ours have attention_mode in their loader", ""),
    "--use-flash-attention": ("is of ComfyUI's own models: ours have attention_mode in their loader", ""),
    "--enable-triton-backend": ("comfy-kitchen may use Triton", ""),
    "--reserve-vram": ("so much of VRAM is left to others, by our plans too", ""),
}


def check_comfyui(version: str, settings: Mapping[str, Any]) -> Iterator[Finding]:
    """`settings` are the values of its command line by name, as argparse has them."""
    yield Finding(PART, "ComfyUI", "good" if version else "told", version or "of a version that is not known")
    given = [flag for flag in FLAGS if settings.get(flag.removeprefix("--").replace("-", "_"))]
    for flag in given:
        text, fix = FLAGS[flag]
        value = settings[flag.removeprefix("--").replace("-", "_")]
        shown = flag if value is True else f"{flag} {value}"
        yield Finding(PART, shown, "bad" if fix else "told", text, fix)
    if not given:
        yield Finding(PART, "flags", "good", "none that changes what this package does")
