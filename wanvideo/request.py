"""What to generate, and the settings that each Wan variant was made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from ..transformer.nag import NagSettings
from .network.config import WanConfig
from .vae.model import VAEConfig

T = TypeVar("T")

MOST_GUIDANCE = 1000.0
MOST_STRENGTH = 100.0  # of a control video

# Wan's own sample_neg_prompt (wan/configs/shared_config.py)
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True)
class WanDefaults:
    """A variant's published settings; `guidance_high` and `boundary` are for the two experts of Wan 2.2."""

    shift: float
    guidance: float
    num_steps: int = 50
    fps: int = 16
    num_frames: int = 81
    size: tuple[int, int] = (832, 480)  # width, height
    guidance_high: float | None = None
    boundary: float | None = None


# see wan/configs/*.py of Wan 2.1 and 2.2
DEFAULTS: Mapping[str, WanDefaults] = MappingProxyType(
    {
        "t2v": WanDefaults(shift=5.0, guidance=5.0),
        "t2v small": WanDefaults(shift=8.0, guidance=6.0),
        "t2v experts": WanDefaults(shift=12.0, guidance=3.0, num_steps=40, guidance_high=4.0, boundary=0.875),
        "i2v": WanDefaults(shift=3.0, guidance=5.0, num_steps=40),
        "i2v experts": WanDefaults(shift=5.0, guidance=3.5, num_steps=40, guidance_high=3.5, boundary=0.9),
        "flf2v": WanDefaults(shift=16.0, guidance=5.5),
        "vace": WanDefaults(shift=16.0, guidance=5.0),
        # aigc-apps/VideoX-Fun `examples/wan2.1_fun/predict_v2v_control.py`, `examples/wan2.2_fun`
        "control": WanDefaults(shift=3.0, guidance=6.0),
        "control large": WanDefaults(shift=5.0, guidance=6.0, fps=24, num_frames=121, size=(1280, 704)),
        "ti2v": WanDefaults(shift=5.0, guidance=5.0, fps=24, num_frames=121, size=(1280, 704)),
        # the pack's own demo model
        "demo": WanDefaults(shift=3.0, guidance=4.0, num_steps=20, fps=8, num_frames=17, size=(96, 96)),
    }
)


def defaults_for(config: WanConfig, experts: bool) -> WanDefaults:
    """The published settings of the model with these dimensions; ValueError for one that only ComfyUI can feed."""
    if experts and config.model_type in ("t2v", "i2v"):
        return DEFAULTS[f"{config.model_type} experts"]
    if config.model_type == "t2v" and config.dim < 1024:
        return DEFAULTS["demo"]
    if config.model_type == "t2v" and config.dim < 5120:
        return DEFAULTS["t2v small"]
    if config.model_type == "control" and config.out_channels == 48:
        return DEFAULTS["control large"]
    if config.model_type not in DEFAULTS:
        raise ValueError(
            f"this is a Wan {config.model_type} model, whose inputs the command line cannot give: use it in ComfyUI"
        )
    return DEFAULTS[config.model_type]


def plan_defaults(config: WanConfig) -> WanDefaults:
    """Those whose size and length are planned for, also of a model that only ComfyUI can feed."""
    if config.model_type in DEFAULTS or config.model_type == "t2v":
        return defaults_for(config, experts=False)
    if config.out_channels == 48:
        return DEFAULTS["ti2v"]  # Fun models made of it
    return DEFAULTS["t2v" if config.dim >= 5120 else "t2v small"]


@dataclass(frozen=True)
class WanRequest:
    """One video. None means the model's published setting (`completed`).

    `image` and `end_image` are picture files, for models that take them, as are `control`, a video that steers, of
    which `control_fps` frames a second are read, and by so much as `control_strength` says (VACE), and `reference`, a
    picture of what shall be seen. `timesteps` is a distilled model's own
    list, such as (1000, 937.5, 833.3, 625), and replaces `num_steps` and `shift`. `guidance` 1 turns
    classifier-free guidance off, `nag` has the negative prompt count in attention; `guidance_high` is for the
    high-noise expert.
    """

    prompt: str
    negative_prompt: str = NEGATIVE_PROMPT
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    seed: int = 0
    num_steps: int | None = None
    sampler: str = "unipc"
    spacing: str = "uniform"
    shift: float | None = None
    guidance: float | None = None
    guidance_high: float | None = None
    boundary: float | None = None
    timesteps: tuple[float, ...] | None = None
    image: Path | None = None
    end_image: Path | None = None
    control: Path | None = None
    reference: Path | None = None
    control_strength: float | None = None
    control_fps: float | None = None
    nag: NagSettings | None = None

    def completed(self, known: WanDefaults) -> WanRequest:
        """The request with the model's published settings where it has None."""
        low, high = self.guidance, self.guidance_high
        if high is None and known.guidance_high is not None:
            high = known.guidance_high if low is None else low
        return replace(
            self,
            width=_given(self.width, known.size[0]),
            height=_given(self.height, known.size[1]),
            num_frames=_given(self.num_frames, known.num_frames),
            num_steps=_given(self.num_steps, known.num_steps),
            shift=_given(self.shift, known.shift),
            guidance=_given(low, known.guidance),
            guidance_high=high,
            boundary=_given(self.boundary, known.boundary),
            control_fps=_given(self.control_fps, known.fps),
        )

    @property
    def size(self) -> tuple[int, int, int]:
        """Width, height and frames of a completed request."""
        assert self.width is not None and self.height is not None and self.num_frames is not None
        return self.width, self.height, self.num_frames

    @property
    def guided(self) -> bool:
        """Whether some step of a completed request is guided, and so takes the negative prompt."""
        return self.guidance != 1 or self.guidance_high not in (None, 1)

    @property
    def hears_negative(self) -> bool:
        """Whether the negative prompt counts: by guidance, or in attention."""
        return self.guided or self.nag is not None


def check_experts(request: WanRequest, model: str, experts: bool) -> None:
    """ValueError where a completed request's settings of two experts do not suit a model that is one file, or is two.

    `model` is the file's name, of two that of the high-noise one.
    """
    if experts:
        if request.boundary is None:
            raise ValueError(
                f"no boundary is known for {model}: give the sigma where the low-noise expert takes over (--boundary), "
                "such as 0.9, or leave out the low-noise model (--model-low)"
            )
        return
    roles = {
        "guidance_high": "for the high-noise expert of Wan 2.2 A14B",
        "boundary": "where the low-noise expert of Wan 2.2 A14B takes over",
    }
    for name, role in roles.items():
        value = getattr(request, name)
        if value is not None:
            raise ValueError(
                f"{name} is {value}, {role}, but there is only {model}: leave it out, or give the low-noise model too "
                "(--model-low)"
            )


def check_request(request: WanRequest) -> None:
    """ValueError where a value is no use to any model; sizes are `check_size`'s, noise levels the schedule's."""
    if not request.prompt.strip():
        raise ValueError("the prompt is empty: say what the video shows, such as 'a red ball moves left'")
    if not 0 <= request.seed < 2**64:
        raise ValueError(f"seed is {request.seed}: use a whole number from 0 to {2**64 - 1}")
    for name, scale in (("guidance", request.guidance), ("guidance_high", request.guidance_high)):
        if scale is not None and not abs(scale) <= MOST_GUIDANCE:
            raise ValueError(f"{name} is {scale}: use a finite number, such as 5 (1 turns guidance off)")
    if request.control_strength is not None and not 0 <= request.control_strength <= MOST_STRENGTH:
        raise ValueError(f"control_strength is {request.control_strength}: use a number from 0 to {MOST_STRENGTH:g}")
    if request.boundary is not None and not 0 < request.boundary < 1:
        raise ValueError(f"boundary is {request.boundary}: use a sigma between 0 and 1, such as 0.875")


def _given(value: T | None, known: T) -> T:
    return known if value is None else value


def check_size(vae: VAEConfig, patch: int, width: int, height: int, num_frames: int) -> None:
    """ValueError unless the VAE and the model's patches can make a video of this size."""
    unit = vae.spatial_stride * patch
    if width % unit or height % unit or min(width, height) < unit:
        nearest = [max(unit, round(side / unit) * unit) for side in (width, height)]
        raise ValueError(
            f"{width}x{height} cannot be made: this model needs sides that are multiples of {unit}; "
            f"use {nearest[0]}x{nearest[1]}"
        )
    stride = vae.temporal_stride
    if num_frames < 1 or (num_frames - 1) % stride:
        below = max(1, (num_frames - 1) // stride * stride + 1)
        raise ValueError(
            f"{num_frames} frames cannot be made: Wan makes {stride}n + 1 frames; use {below} or {below + stride}"
        )
