"""FramePack's loop: section after section, each shown the others and resumed where a run stopped.

Source: lllyasviel/FramePack (`demo_gradio.py`, `demo_gradio_f1.py`), arXiv:2504.12626. Latents and noise are made on
the CPU in fp32, so that a run is the same on every machine but for the network's rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ...memory.plan.plan import MemoryPlan
from ...sampling.guidance import RescaledGuidance
from ...sampling.samplers import select_sampler
from ...sampling.schedules import NUM_TRAIN_TIMESTEPS, framepack_shift, framepack_sigmas
from ...sampling.solver import StepInfo
from ...sampling.step_cache import TeaCache
from ..footprint import SectionSize
from ..network.model import BlockCache, Frames, History, StepCondition
from ..request import EncodedInputs, Sampling
from ..sections import SPATIAL_STRIDE, Section, num_frames, section_noise
from ..streamed import StreamedFramePack
from .folder import RunStore

# (noisy, history, condition, image, cache) -> velocity; a StreamedFramePack that is started, or a model.
Velocity = Callable[[Frames, History, StepCondition, Tensor | None, BlockCache | None], Tensor]
OnStep = Callable[[Section, StepInfo], None]


@dataclass(frozen=True)
class Conditions:
    """What the steps see: of each prompt by step, of the negative one, and the image tokens of each section."""

    prompts: Mapping[str, Sequence[StepCondition]]
    negative: Sequence[StepCondition] | None
    images: Sequence[Tensor | None]

    def of(self, prompts: Sequence[tuple[str, float]], step: int) -> StepCondition:
        """One step of a prompt, or of several mixed by their weights."""
        if len(prompts) == 1:
            return self.prompts[prompts[0][0]][step]
        parts = [(self.prompts[name][step], weight) for name, weight in prompts]

        num_tokens = max(len(part.text) for part, _ in parts)

        def mix(pick: Callable[[StepCondition], Tensor]) -> Tensor:
            return torch.stack([pick(part).float() * weight for part, weight in parts]).sum(0).to(pick(parts[0][0]))

        def text(part: StepCondition) -> Tensor:
            return F.pad(part.text, (0, 0, 0, num_tokens - len(part.text)))

        num_blocks = len(parts[0][0].blocks)
        blocks = tuple(mix(lambda part, index=index: part.blocks[index]) for index in range(num_blocks))  # type: ignore[misc]
        return StepCondition(mix(text), blocks, mix(lambda part: part.head))


# For a run whose sections are all there.
NOTHING = Conditions({}, None, ())


@dataclass(frozen=True)
class MadeSection:
    """A section that is done: its own latents, and those to decode now (`section.to_decode`), all on the CPU.

    `video` are all latents made so far, in the video's order.
    """

    section: Section
    latents: Tensor
    to_decode: Tensor
    video: Tensor


def noise_levels(sampling: Sampling, latent_size: tuple[int, int]) -> Tensor:
    """Sigmas `[steps + 1]` of every section."""
    height, width = latent_size
    num_latents = sampling.window if sampling.one_frame is None else 1
    tokens = num_latents * (height // 2) * (width // 2)
    mu = math.log(sampling.shift) if sampling.shift else framepack_shift(tokens)
    return framepack_sigmas(sampling.num_steps, mu, sampling.strength)


def section_size(sampling: Sampling, latent_size: tuple[int, int], end_image: bool) -> SectionSize:
    """The work of one pass over a section of `latent_size`, (height, width)."""
    height, width = (SPATIAL_STRIDE * side for side in latent_size)
    one_frame = sampling.one_frame is not None
    return SectionSize(
        1 if one_frame else num_frames(sampling.window),
        height,
        width,
        passes_per_step=1 if sampling.cfg == 1.0 else 2,
        clean_frames=1 if one_frame else 2 + end_image,
        with_history=not one_frame,
        step_cache=sampling.cache_threshold is not None,
    )


def prepare(
    model: StreamedFramePack, plan: MemoryPlan, sampling: Sampling, inputs: EncodedInputs, sections: tuple[Section, ...]
) -> Conditions:
    """All that depends on steps, prompts and pictures alone. The model is not started yet."""
    sigmas = noise_levels(sampling, inputs.latent_size)
    # the model was trained with timesteps rounded to bf16
    timesteps = (sigmas[:-1] * NUM_TRAIN_TIMESTEPS).bfloat16().float()
    prompts = dict(inputs.prompts_of(sections))
    wanted = list(prompts.values())
    if sampling.cfg != 1.0 and inputs.negative is not None:
        wanted.append(inputs.negative)
    features = [inputs.features(section) for section in sections]
    made, images = model.prepared(plan, wanted, features, timesteps, sampling.guidance * NUM_TRAIN_TIMESTEPS)
    negative = made[-1] if len(made) > len(prompts) else None
    return Conditions(dict(zip(prompts, made, strict=False)), negative, images)


@dataclass(frozen=True)
class Generation:
    """One run, ready to go: `for made in generation.run(): ...`."""

    velocity: Velocity
    sampling: Sampling
    inputs: EncodedInputs
    sections: tuple[Section, ...]
    conditions: Conditions
    device: torch.device
    store: RunStore | None = None
    on_step: OnStep | None = None

    def run(self) -> Iterator[MadeSection]:
        """The sections in order of generation; those that the store has are not made again."""
        generator = torch.Generator().manual_seed(self.sampling.seed)
        history = self.inputs.new_history(self.sampling.mode)
        num_before = history.shape[2]
        caches = self._caches()
        for section in self.sections:
            if self.store is not None and section.number < self.store.completed:
                stored = self.store.load(section.number)
                latents = stored.latents
                generator.set_state(stored.generator_state)
            else:
                try:
                    latents = self._sample(section, history, generator, caches)
                finally:
                    for cache in caches:
                        cache.begin_section()
                if section.prepend_start:
                    latents = torch.cat([self.inputs.start_latent(), latents], dim=2)
                if self.store is not None:
                    self.store.save_section(section.number, latents, generator.get_state())
            history = torch.cat([latents, history] if section.prepend else [history, latents], dim=2)
            video = latents if section.sources is None else self._video(history, num_before)
            yield MadeSection(section, latents, history[:, :, section.to_decode], video)

    def _sample(
        self, section: Section, history: Tensor, generator: torch.Generator, caches: Sequence[TeaCache]
    ) -> Tensor:
        """The section's latents `[1, 16, window, h, w]`."""
        sigmas = noise_levels(self.sampling, self.inputs.latent_size)
        shape = (1, history.shape[1], len(section.indices.noisy), *self.inputs.latent_size)
        noise = section_noise(generator, shape)
        initial = self.inputs.initial_latents(section)
        if initial is not None and len(sigmas) == 1:  # a strength of 0 leaves no step
            return initial
        x = noise if initial is None else torch.lerp(initial, noise, float(sigmas[0]))
        shown = self._history(section, history)
        steps = {float(sigma): step for step, sigma in enumerate(sigmas[:-1])}
        indices = torch.tensor(section.indices.noisy)
        image = self.conditions.images[section.number]
        image = None if image is None else image.to(self.device)
        prompts = self.inputs.timed.prompts_at(section)
        negative = self.conditions.negative

        def predict(number: int, condition: Callable[[int], StepCondition], x: Tensor, sigma: Tensor) -> Tensor:
            step, cache = steps[float(sigma)], caches[number] if caches else None
            if cache is not None:
                cache.begin_step(step)
            return self.velocity(Frames(x, indices), shown, condition(step), image, cache)

        def report(step: StepInfo) -> None:
            if self.on_step is not None:
                self.on_step(section, step)

        settings = self.sampling
        cond = partial(predict, 0, partial(self.conditions.of, prompts))
        uncond = partial(predict, 1, negative.__getitem__) if negative else None
        denoise = RescaledGuidance(cond, uncond, settings.cfg, settings.cfg_rescale)
        return select_sampler(settings.sampler)(denoise, x.to(self.device), sigmas, report).float().cpu()

    def _history(self, section: Section, history: Tensor) -> History:
        """What a section is shown, on the device."""
        places, sources = section.indices, section.sources
        near = [self.inputs.start_latent()]
        if sources is not None and not section.end_is_one:
            near.append(history[:, :, sources.one])
        if places.end is not None:
            assert self.inputs.end is not None
            near.append(self.inputs.end)
        clean = self._frames(torch.cat(near, dim=2), places.clean)
        if sources is None:
            return History(clean)
        return History(
            clean,
            self._frames(history[:, :, sources.two], places.two),
            self._frames(history[:, :, sources.four], places.four),
        )

    def _frames(self, latents: Tensor, indices: Sequence[int]) -> Frames:
        return Frames(latents.to(self.device), torch.tensor(indices))

    def _video(self, history: Tensor, num_before: int) -> Tensor:
        """Of the history what belongs to the video."""
        if self.sampling.mode == "f1":
            first = self.inputs.num_given or int(self.inputs.has_start)
            return history[:, :, num_before - first :]
        return history[:, :, : history.shape[2] - num_before]

    def _caches(self) -> list[TeaCache]:
        """One for each prompt of a step: their signals differ."""
        settings = self.sampling
        if settings.cache_threshold is None or settings.strength == 0.0:
            return []
        num_prompts = 2 if self.conditions.negative else 1
        return [TeaCache(settings.num_steps, settings.cache_threshold) for _ in range(num_prompts)]
