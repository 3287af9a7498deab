"""What a video is asked to be made of, as the network takes it: prompts, pictures and videos through their encoders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..runtime.progress import Progress
from ..runtime.settings import RunSettings
from ..vae.retries import at_work, once_more
from ..vae.tiling import encode_fitting
from ..video.pictures import from_uint8
from ..weights.files.checkpoint import CheckpointError
from .network.config import IMAGE_TOKENS, FramePackConfig
from .network.model import Prompt
from .request import EncodedInputs, Interpolation
from .text.images import ImageEncoder
from .text.prompts import PromptEncoder
from .timed_prompts import TimedPrompt
from .vae.checkpoint import HUNYUAN_FORMAT


@dataclass(frozen=True)
class EncoderFiles:
    """LLaVA-LLaMA-3, CLIP-L, SigLIP (only for pictures) and the VAE; `tokenizers` None: beside the text encoders."""

    text_encoder: Path
    clip: Path
    vae: Path
    vision: Path | None = None
    tokenizers: Path | None = None


@dataclass(frozen=True)
class Inputs:
    """Texts, pictures `[1, 3, 1, H, W]` in -1 ... 1 and videos uint8 `[T, H, W, 3]` of 4n + 1 frames, all on the CPU.

    `size` is their (width, height). `initial` is a video to change, `given` the end of one to go on from, of which
    `given_after` seconds come before. A video without a start picture starts at its first frame.
    """

    timed: TimedPrompt
    size: tuple[int, int]
    negative: str | None = None
    start: Tensor | None = None
    end: Tensor | None = None
    initial: Tensor | None = None
    given: Tensor | None = None
    given_after: float = 0.0
    start_strength: float = 1.0
    interpolation: Interpolation = "linear"

    @property
    def first_picture(self) -> Tensor | None:
        """What the video starts at, `[1, 3, 1, H, W]`."""
        if self.start is not None:
            return self.start
        video = self.given if self.initial is None else self.initial
        return None if video is None else from_uint8(video[:1])


class Encoders:
    """All encoders of one model, opened: headers and tokenizers are read, weights only while each works.

    CheckpointError for files of other models.
    """

    def __init__(self, files: EncoderFiles, settings: RunSettings, progress: Progress = Progress()):  # noqa: B008
        self.files, self.settings, self.progress = files, settings, progress
        # as FramePack's own; bf16 would keep three bits less of features that decide the whole video
        dtype = torch.float32 if settings.compute_dtype == torch.float32 else torch.float16
        self._prompts = PromptEncoder(files.text_encoder, files.clip, files.tokenizers, settings.device, dtype)
        self._images = None if files.vision is None else ImageEncoder(files.vision, settings.device, dtype)

    def check(self, config: FramePackConfig, model: Path) -> None:
        """CheckpointError unless the model reads what these encoders make."""
        made = [
            (self.files.text_encoder, "hidden states", self._prompts.text_dim, config.text_dim),
            (self.files.clip, "pooled vectors", self._prompts.pooled_dim, config.pooled_dim),
        ]
        if self._images is not None and self.files.vision is not None:
            made.append((self.files.vision, "image features", self._images.image_dim, config.image_dim))
        for path, what, found, wanted in made:
            if found != wanted:
                raise CheckpointError(
                    f"{path}: makes {what} of width {found}, but {model.name} reads {wanted}; "
                    "choose the encoders that go with that model (lowvram-video inspect names them)"
                )

    @torch.inference_mode()
    def encode(self, inputs: Inputs, config: FramePackConfig) -> EncodedInputs:
        """Everything through its encoder, one encoder on the device at a time and none when this returns."""
        with self._alone("prompts"):
            names = inputs.timed.prompts()
            texts = [*names, *([] if inputs.negative is None else [inputs.negative])]
            made: list[Prompt] = once_more(lambda: self._prompts.encode(texts), "encoding the prompts")
        first = inputs.first_picture
        with self._alone("image features"):
            start_features, end_features = (self._features(picture) for picture in (first, inputs.end))
        if start_features is None and end_features is None:
            start_features = torch.zeros(1, IMAGE_TOKENS, config.image_dim)  # the network always has some
        start = first if inputs.given is None else inputs.start  # a video to go on from has its own first latent
        videos = [None if video is None else from_uint8(video) for video in (inputs.initial, inputs.given)]
        with self._alone("latents"):
            start_latent, end_latent, initial, given = self._latents([start, inputs.end, *videos])
        width, height = inputs.size
        return EncodedInputs(
            latent_size=(height // 8, width // 8),
            timed=inputs.timed,
            prompts=dict(zip(names, made, strict=False)),
            negative=None if inputs.negative is None else made[-1],
            start=start_latent,
            end=end_latent,
            start_features=start_features,
            end_features=end_features,
            initial=initial,
            given=given,
            given_after=inputs.given_after,
            start_strength=inputs.start_strength,
            interpolation=inputs.interpolation,
        )

    @contextmanager
    def _alone(self, title: str) -> Iterator[None]:
        """One encoder's turn: what it leaves on the device is given back."""
        self.progress.begin(title)
        try:
            yield
        finally:
            self.progress.end()
            torch.cuda.empty_cache()

    def _features(self, picture: Tensor | None) -> Tensor | None:
        if picture is None:
            return None
        images = self._images
        assert images is not None, "pictures want a vision model"
        return once_more(lambda: images.encode(picture[:, :, 0]), "encoding a picture")

    def _latents(self, clips: Sequence[Tensor | None]) -> list[Tensor | None]:
        if all(clip is None for clip in clips):
            return [None] * len(clips)
        opened, settings = HUNYUAN_FORMAT.open_file(self.files.vae), self.settings
        with at_work(lambda: opened.build(settings.compute_dtype, settings.device, "encoder")) as vae:
            return [None if clip is None else encode_fitting(vae, clip) for clip in clips]
