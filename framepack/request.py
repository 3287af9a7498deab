"""What to generate: the settings of the sampling loop, and what the video is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..transformer.nag import NagSettings
from .network.config import FramePackConfig
from .network.model import Prompt
from .sections import NUM_HISTORY, Section, SectionMode, plan_one_frame, plan_sections
from .timed_prompts import TimedPrompt

# How a section's image features come from those of the start and the end image: only the start's; both, weighted by the
# start's strength; or gliding from one to the other along the video.
Interpolation = Literal["disabled", "weighted_average", "linear"]

NUM_STEPS, MAX_STEPS = 25, 1000  # the first as FramePack's own demos have it
MOST = 1000.0  # of a number by which something is multiplied: what is more makes no picture
NEGATIVE = "negative"  # the name of that prompt among `EncodedInputs.prompts_to_make`
SAMPLERS = ("unipc_bh1", "unipc_bh2", "euler", "dpm++_2m")  # the first is FramePack's own


@dataclass(frozen=True)
class Sampling:
    """How the sections are made. `shift` 0 is chosen for the size; `cache_threshold` None computes every step.

    `guidance` is the distilled one, `cfg` runs a second pass (1: none). `strength` below 1 begins from a given video.
    `one_frame` makes a single picture, so many latents after the start image. `mode` is the kind of the model. `nag`
    has a negative prompt count in attention.
    """

    seconds: float = 5.0
    mode: SectionMode = "base"
    window: int = 9
    num_steps: int = NUM_STEPS
    sampler: str = "unipc_bh1"
    guidance: float = 10.0
    cfg: float = 1.0
    cfg_rescale: float = 0.0
    shift: float = 0.0
    seed: int = 0
    cache_threshold: float | None = 0.15
    strength: float = 1.0
    one_frame: int | None = None
    nag: NagSettings | None = None

    def identity(self) -> dict[str, Any]:
        """All of it as JSON values, `nag` only where it is: runs from before it could be are still known."""
        return {name: value for name, value in asdict(self).items() if name != "nag" or value is not None}

    def check(self) -> None:
        """ValueError where a value is no use; the video's length is `plan_sections`'s to check."""
        if not 1 <= self.num_steps <= MAX_STEPS:
            raise ValueError(f"steps is {self.num_steps}: use 1 to {MAX_STEPS} (25 or 30 are usual)")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}: use a whole number from 0 to {2**64 - 1}")
        numbers = {"guidance_scale": self.guidance, "cfg": self.cfg, "shift": self.shift}
        for name, value in (numbers | {"the TeaCache threshold": self.cache_threshold or 0.0}).items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}: use a number from 0 up")
            if value > MOST:
                raise ValueError(f"{name} is {value:g}: use a number from 0 to {MOST:g}")
        for name, value in (("cfg_rescale", self.cfg_rescale), ("denoise_strength", self.strength)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} is {value}: use a number from 0 to 1")
        if self.nag is not None:
            self.nag.check()
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler {self.sampler!r} does not apply to FramePack: use {', '.join(SAMPLERS)}")


@dataclass(frozen=True)
class EncodedInputs:
    """What the video is made of, as the encoders give it, all on the CPU in fp32.

    `latent_size` is (height, width) of the latents, which are the network's `[1, 16, T, h, w]`; features are SigLIP's
    `[1, m, image_dim]`. Without a start image the video is made of the text alone. `initial` is a video to begin from
    (`strength`), `given` one to extend (F1), or its end: `given_after` seconds of it come before. Where
    `initial_mask [1, 1, T, h, w]` is 0, `initial` stays. `others` are prompts that a host's own guidance asks for by
    their names, and with `guided` it may ask for the negative one at any cfg. `nag` is the negative prompt of attention
    alone, where that has its own.
    """

    latent_size: tuple[int, int]
    timed: TimedPrompt
    prompts: Mapping[str, Prompt]  # all that `timed` names
    negative: Prompt | None = None
    start: Tensor | None = None
    end: Tensor | None = None
    start_features: Tensor | None = None
    end_features: Tensor | None = None
    start_strength: float = 1.0
    interpolation: Interpolation = "linear"
    initial: Tensor | None = None
    given: Tensor | None = None
    given_after: float = 0.0
    initial_mask: Tensor | None = None
    others: Mapping[str, Prompt] = field(default_factory=dict)
    guided: bool = False
    nag: Prompt | None = None

    def sections(self, sampling: Sampling) -> tuple[Section, ...]:
        """The sections in order of generation. ValueError where settings and inputs contradict each other."""
        sampling.check()
        self._check(sampling)
        if sampling.one_frame is not None:
            return plan_one_frame(sampling.one_frame)
        sections = plan_sections(
            sampling.seconds,
            sampling.window,
            sampling.mode,
            start_image=self.has_start,
            end_image=self.end is not None,
            given_latents=self.num_given,
        )
        # the seconds of a given video that none of its latents hold
        return tuple(
            replace(section, seconds=(section.seconds[0] + self.given_after, section.seconds[1] + self.given_after))
            for section in sections
        )

    @property
    def num_given(self) -> int:
        """Latents of the video to extend."""
        return 0 if self.given is None else self.given.shape[2]

    @property
    def has_start(self) -> bool:
        """Whether the video begins with a picture of its own: the start image, or the first of `initial`."""
        return self.start is not None or self.initial is not None

    def start_latent(self) -> Tensor:
        """`[1, 16, 1, h, w]` that every section is shown; zeros where the video starts at no picture."""
        if self.start is not None:
            return self.start
        video = self.given if self.initial is None else self.initial
        return torch.zeros(1, 16, 1, *self.latent_size) if video is None else video[:, :, :1]

    def new_history(self, mode: SectionMode) -> Tensor:
        """What the first section sees as the rest of the video: nothing, or (F1) the start or a given video."""
        start = self.start_latent()
        nothing = torch.zeros(1, start.shape[1], NUM_HISTORY, *self.latent_size)
        if mode == "f1":
            return torch.cat([nothing, start if self.given is None else self.given], dim=2)
        return nothing

    def initial_latents(self, section: Section) -> Tensor | None:
        """The given video where this section lies; its last latent stays where it is too short."""
        return None if self.initial is None else _where(self.initial, section)

    def mask(self, section: Section) -> Tensor | None:
        """What of the given video is made anew there."""
        return None if self.initial_mask is None else _where(self.initial_mask, section)

    def prompts_to_make(self, cfg: float) -> Mapping[str, Prompt]:
        """The prompts beside those of the schedule, the negative one by `NEGATIVE`."""
        negative = self.negative if cfg != 1.0 or self.guided else None
        return dict(self.others) if negative is None else {NEGATIVE: negative, **self.others}

    @property
    def nag_prompt(self) -> Prompt | None:
        """The negative prompt of attention."""
        return self.negative if self.nag is None else self.nag

    def features(self, section: Section) -> Tensor | None:
        """The image features that a section is shown, `[1, m, image_dim]`."""
        start, end = self.start_features, self.end_features
        if start is None:
            return end
        if end is None or self.interpolation == "disabled":
            return start * self.start_strength
        share = self.start_strength if self.interpolation == "weighted_average" else 1.0 - self._place(section)
        return start * share + end * (1.0 - share)

    def prompts_of(self, sections: tuple[Section, ...]) -> Mapping[str, Prompt]:
        """The prompts that these sections hear."""
        used = [self.timed.prompts_at(section) for section in sections]
        return {name: self.prompts[name] for prompts in used for name, _ in prompts}

    def identity(self) -> dict[str, Any]:
        """All of it as JSON values and tensors: what a run is known by."""
        return (
            {
                "timed": asdict(self.timed),
                "prompts": {name: _identity(prompt) for name, prompt in self.prompts.items()},
                "negative": None if self.negative is None else _identity(self.negative),
                "latent_size": list(self.latent_size),
                "given_after": self.given_after,
                "interpolation": self.interpolation,
                "start_strength": self.start_strength,
            }
            | {
                name: getattr(self, name)
                for name in ("start", "end", "start_features", "end_features", "initial", "given")
            }
            | self._identity_of_guidance()
        )

    def _identity_of_guidance(self) -> dict[str, Any]:
        """Only what there is: runs from before that could be are still known."""
        others = {name: _identity(prompt) for name, prompt in self.others.items()}
        parts: dict[str, Any] = {"initial_mask": self.initial_mask, "others": others or None}
        parts |= {"guided": self.guided or None, "nag": None if self.nag is None else _identity(self.nag)}
        return {name: part for name, part in parts.items() if part is not None}

    def _place(self, section: Section) -> float:
        """Where the section lies in the video, 0 (begin) to 1 (end)."""
        if section.num_sections == 1:
            return 0.5
        order = section.num_sections - 1 - section.number if section.prepend else section.number
        return order / (section.num_sections - 1)

    def check_for(self, config: FramePackConfig) -> None:
        """ValueError where prompts, pictures or latents are not those that this model reads."""
        named = {f"the prompt {name!r}": prompt for name, prompt in (*self.prompts.items(), *self.others.items())}
        for title, prompt in (("the negative prompt", self.negative), ("the negative prompt of NAG", self.nag)):
            if prompt is not None:
                named[title] = prompt
        for title, prompt in named.items():
            if not prompt.text.shape[1]:
                raise ValueError(f"{title} has no tokens: write a word, or encode it again")
            widths = prompt.text.shape[-1], prompt.pooled.shape[-1]
            if widths != (config.text_dim, config.pooled_dim):
                raise ValueError(
                    f"{title} has text of width {widths[0]} and a pooled vector of {widths[1]}; FramePack reads "
                    f"{config.text_dim} and {config.pooled_dim}: encode it with llava_llama3 and clip_l "
                    "(DualCLIPLoader, type hunyuan_video)"
                )
        pictures = {"start": self.start_features, "end": self.end_features}
        for title, features in pictures.items():
            if features is not None and features.shape[-1] != config.image_dim:
                raise ValueError(
                    f"the {title} image's features have the width {features.shape[-1]}; FramePack reads "
                    f"{config.image_dim}: use sigclip_vision_patch14_384 as the vision model"
                )
        lengths = {features.shape[1] for features in pictures.values() if features is not None}
        if len(lengths) > 1:
            raise ValueError(
                f"the start and the end image have features of {' and '.join(map(str, sorted(lengths)))} tokens: "
                "encode both with the same vision model"
            )

    def _check(self, sampling: Sampling) -> None:
        height, width = self.latent_size
        if height % 2 or width % 2:
            raise ValueError(
                f"{8 * width}x{8 * height} cannot be made: FramePack needs sides that are multiples of 16; bring the "
                "picture to a size that FramePack Find Nearest Bucket names"
            )
        if self.interpolation not in get_args(Interpolation):
            raise ValueError(f"embed_interpolation is {self.interpolation!r}: use {', '.join(get_args(Interpolation))}")
        if not 0.0 <= self.start_strength <= 1.0:
            raise ValueError(f"the start image's strength is {self.start_strength}: use a number from 0 to 1")
        if sampling.cfg != 1.0 and self.negative is None:
            raise ValueError(f"cfg is {sampling.cfg}, which needs a negative prompt: connect one, or set cfg to 1")
        if sampling.nag is not None and self.nag_prompt is None:
            raise ValueError("NAG needs a negative prompt: give one, or leave NAG out")
        if sampling.strength < 1.0 and self.initial is None:
            raise ValueError(
                f"denoise_strength is {sampling.strength}, but there is no video to begin from: connect "
                "initial_samples, or set denoise_strength to 1"
            )
        if self.given is not None and self.initial is not None:
            raise ValueError(
                "a video is either changed (initial_samples) or extended (extend_samples): connect one of them"
            )
        if self.given is not None and sampling.mode != "f1":
            raise ValueError(
                "a video is extended forwards, which the base model cannot do (it works from the end to the start): "
                "choose an F1 model, or give the video's last frame as the start image"
            )
        for name in ("start", "end", "initial", "given"):
            latent: Tensor | None = getattr(self, name)
            if latent is not None and (latent.ndim != 5 or tuple(latent.shape[3:]) != self.latent_size):
                raise ValueError(
                    f"the {name} latent has the shape {list(latent.shape)}; expected [1, 16, frames, {height}, "
                    f"{width}] as the start image has: bring all pictures to {8 * width}x{8 * height} first"
                )


def _where(video: Tensor, section: Section) -> Tensor:
    """Of a video's latents those where a section lies; the last one stays where it is too short."""
    first, end = section.latents
    last = video.shape[2] - 1
    return video[:, :, [min(index, last) for index in range(first, end)]]


def _identity(prompt: Prompt) -> list[Any]:
    own = [] if prompt.guidance is None else [prompt.guidance]
    return [prompt.text, prompt.pooled, *own]
