"""FramePack's loop: section after section, each shown the others and resumed where a run stopped.

Source: lllyasviel/FramePack (`demo_gradio.py`, `demo_gradio_f1.py`), arXiv:2504.12626. Latents and noise are made on
the CPU in fp32, so that a run is the same on every machine but for the network's rounding.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ...memory.plan.plan import MemoryPlan
from ...runtime.latent_watch import BadLatents, LatentWatch
from ...sampling.schedules import NUM_TRAIN_TIMESTEPS, framepack_shift, framepack_sigmas
from ...sampling.solver import StepInfo
from ...system.device_errors import is_out_of_memory
from ...transformer.block_cache import BlockCache
from ..footprint import SectionSize
from ..network.model import Frames, History, StepCondition, StepNag
from ..request import EncodedInputs, Sampling
from ..section_work import POSITIVE, FramePackGuidance, Guide, SectionWork, StepCaches
from ..sections import SPATIAL_STRIDE, Section, num_frames, section_noise
from ..streamed import StreamedFramePack
from .folder import RunStore

logger = logging.getLogger(__name__)

# (noisy, history, condition, image, cache) -> velocity; a StreamedFramePack that is started, or a model.
Velocity = Callable[[Frames, History, StepCondition, Tensor | None, BlockCache | None], Tensor]
OnStep = Callable[[Section, StepInfo], None]


@dataclass(frozen=True)
class Conditions:
    """What the steps see: of each prompt by step (the schedule's, and `others`), and each section's image tokens.

    `nag` is what guides attention to the positive ones.
    """

    prompts: Mapping[str, Sequence[StepCondition]]
    others: Mapping[str, Sequence[StepCondition]]
    images: Sequence[Tensor | None]
    nag: Sequence[StepNag] = ()

    def seen(self, prompt: str, schedule: Sequence[tuple[str, float]], step: int) -> StepCondition:
        """One step of a prompt by its name among `others`, else of the `schedule`'s."""
        seen = self.others[prompt][step] if prompt in self.others else self.of(schedule, step)
        return replace(seen, nag=self.nag[step]) if self.nag and prompt.startswith(POSITIVE) else seen

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
NOTHING = Conditions({}, {}, ())


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
    return framepack_sigmas(sampling.num_steps, math.log(noise_shift(sampling, latent_size)), sampling.strength)


def noise_shift(sampling: Sampling, latent_size: tuple[int, int]) -> float:
    """The shift of the noise levels: the given one, or by the number of tokens."""
    height, width = latent_size
    num_latents = sampling.window if sampling.one_frame is None else 1
    return sampling.shift or math.exp(framepack_shift(num_latents * (height // 2) * (width // 2)))


def section_size(
    sampling: Sampling, latent_size: tuple[int, int], end_image: bool, num_others: int | None = None
) -> SectionSize:
    """The work of one pass over a section of `latent_size`, (height, width); `num_others` prompts beside the first."""
    if num_others is None:
        num_others = int(sampling.cfg != 1.0)
    height, width = (SPATIAL_STRIDE * side for side in latent_size)
    one_frame = sampling.one_frame is not None
    return SectionSize(
        1 if one_frame else num_frames(sampling.window),
        height,
        width,
        passes_per_step=1 + num_others,
        clean_frames=1 if one_frame else 2 + end_image,
        with_history=not one_frame,
        step_cache=sampling.cache_threshold is not None,
        nag=sampling.nag is not None,
    )


def prepare(
    model: StreamedFramePack, plan: MemoryPlan, sampling: Sampling, inputs: EncodedInputs, sections: tuple[Section, ...]
) -> Conditions:
    """All that depends on steps, prompts and pictures alone. The model is not started yet."""
    sigmas = noise_levels(sampling, inputs.latent_size)
    # the model was trained with timesteps rounded to bf16
    timesteps = (sigmas[:-1] * NUM_TRAIN_TIMESTEPS).bfloat16().float()
    prompts, others = inputs.prompts_of(sections), inputs.prompts_to_make(sampling.cfg)
    wanted, nag = [*prompts.values(), *others.values()], sampling.nag
    if nag is not None:
        assert inputs.nag_prompt is not None, "checked with the sections"
        wanted.append(inputs.nag_prompt)
    features = [inputs.features(section) for section in sections]
    made, images = model.prepared(plan, wanted, features, timesteps, sampling.guidance * NUM_TRAIN_TIMESTEPS)
    negative = [] if nag is None else [StepNag(condition, nag) for condition in made.pop()]
    of_others = dict(zip(others, made[len(prompts) :], strict=True))
    return Conditions(dict(zip(prompts, made, strict=False)), of_others, images, negative)


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
    guide: Guide = field(default_factory=FramePackGuidance)
    cause: str = "damaged weights"  # of latents that are no numbers, in words
    take_safe_path: Callable[[], Conditions | None] = lambda: None  # what is seen on it; None where none is safer
    free: Callable[[], None] = lambda: None  # gives back all that the device has of the model
    at_step: Callable[[int, int], None] = lambda step, num_steps: None  # told before each pass

    def run(self) -> Iterator[MadeSection]:
        """The sections in order of generation; those that the store has are not made again."""
        generator = torch.Generator().manual_seed(self.sampling.seed)
        history = self.inputs.new_history(self.sampling.mode)
        num_before = history.shape[2]
        maker = _SectionMaker(self, generator)
        for section in self.sections:
            if self.store is not None and section.number < self.store.completed:
                stored = self.store.load(section.number)
                latents = stored.latents
                generator.set_state(stored.generator_state)
                if stored.safe_path:
                    maker.take_safe_path()
            else:
                latents = maker.make(section, history)
                if section.prepend_start:
                    latents = torch.cat([self.inputs.start_latent(), latents], dim=2)
                if self.store is not None:
                    self.store.save_section(section.number, latents, generator.get_state(), maker.on_safe_path)
            history = torch.cat([latents, history] if section.prepend else [history, latents], dim=2)
            video = latents if section.sources is None else self._video(history, num_before)
            yield MadeSection(section, latents, history[:, :, section.to_decode], video)

    def shown(self, section: Section, history: Tensor) -> History:
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


class _SectionMaker:
    """Samples a run's sections; from one whose latents are no use on, on the safe path.

    A run that goes on later takes that path from the same section on, so that it makes the same video.
    """

    def __init__(self, run: Generation, generator: torch.Generator) -> None:
        self._run, self._generator = run, generator
        self._conditions = run.conditions
        self._caches = StepCaches.of(run.sampling)
        self.on_safe_path = False

    def take_safe_path(self) -> bool:
        """False where no path is safer."""
        safe = None if self.on_safe_path else self._run.take_safe_path()
        if safe is None:
            return False
        self._conditions, self.on_safe_path = safe, True
        return True

    def make(self, section: Section, history: Tensor) -> Tensor:
        """The section's latents `[1, 16, window, h, w]`; BadLatents where they are no use on the safe path either.

        Where no path is safer the section is made once more if its first steps were right; so it is where the device
        ran out of memory between two passes, which no leaner plan is for.
        """
        before, ran_out = self._generator.get_state(), False
        try:
            return self._sample(section, history)
        except BadLatents as error:
            if not self.take_safe_path() and not error.step:
                raise
            logger.warning("%s: section %d is made once more", error, section.number + 1)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("out of VRAM between two passes: section %d is made once more", section.number + 1)
            ran_out = True
        if ran_out:  # outside the handler: its traceback holds tensors
            self._run.free()
        self._generator.set_state(before)
        return self._sample(section, history)

    def _sample(self, section: Section, history: Tensor) -> Tensor:
        try:
            return self._solve(section, history)
        finally:
            self._caches.begin_section()

    def _solve(self, section: Section, history: Tensor) -> Tensor:
        run, conditions = self._run, self._conditions
        sigmas = noise_levels(run.sampling, run.inputs.latent_size)
        shape = (1, history.shape[1], len(section.indices.noisy), *run.inputs.latent_size)
        noise = section_noise(self._generator, shape)
        initial = run.inputs.initial_latents(section)
        if initial is not None and len(sigmas) == 1:  # a strength of 0 leaves no step
            return initial
        shown = run.shown(section, history)
        indices = torch.tensor(section.indices.noisy)
        image = conditions.images[section.number]
        image = None if image is None else image.to(run.device)
        prompts, others = run.inputs.timed.prompts_at(section), conditions.others

        def predict(prompt: str, x: Tensor, step: int, cache: BlockCache | None) -> Tensor:
            run.at_step(step, len(sigmas) - 1)
            condition = conditions.seen(prompt, prompts, step)
            return run.velocity(Frames(x, indices), shown, condition, image, cache)

        watch = LatentWatch(run.cause)

        def report(step: StepInfo) -> None:
            watch.step(step.index, step.num_steps, step.denoised, step.x)
            if run.on_step is not None:
                run.on_step(section, step)

        mask = run.inputs.mask(section)
        work = SectionWork(
            section, run.sampling, sigmas, noise, initial, mask, others, predict, self._caches, report, run.device
        )
        return run.guide.sample(work).float().cpu()
