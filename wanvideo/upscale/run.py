"""Any video made larger, in the memory that is given: its frames as they come, and what goes on after a stop."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...attention.masked import GatheredBlocks, MaskedAttention
from ...attention.masked_select import select_masked
from ...memory.plan.footprint import Limits, WorkSize
from ...memory.plan.plan import MemoryPlan, PlanError
from ...memory.report.report import RunReport
from ...memory.stream.pinned import Registrar
from ...runtime.progress import Progress
from ...runtime.run_limits import hold_limits
from ...runtime.run_record import RunRecord
from ...runtime.settings import RunSettings
from ...system.scratch_folders import scratch_folder
from ...system.sizes import in_gib
from ...vae.retries import at_work
from ...weights.files.checkpoint import Checkpoint, CheckpointError
from ...weights.files.fingerprint import fingerprint
from ...weights.files.open import open_checkpoint
from ...weights.lora.fingerprint import lora_fingerprint
from ...weights.lora.report import LoraReport
from .decoder import DECODER_FORMAT
from .decoder_memory import DecoderMemory
from .frames import in_order
from .host_windows import HostWindows, WindowSize
from .projection import PROJECTION_FORMAT
from .request import UpscaleFiles, UpscaleRequest, padded
from .stream import Networks, Remembered, UpscaleStream, made
from .streamed import StreamedUpscaler, UpscaleFootprint, upscale_work

logger = logging.getLogger(__name__)


class Upscaler:
    """FlashVSR's files, ready to enlarge one video at a time.

    Opening reads headers only; CheckpointError for files that are none, or do not belong together.
    """

    def __init__(
        self,
        files: UpscaleFiles,
        settings: RunSettings,
        progress: Progress | None = None,
        between_blocks: Callable[[], None] | None = None,
        registrar: Registrar | None = None,
    ) -> None:
        self.files, self.settings, self.progress = files, settings, progress or Progress()
        self._projection = PROJECTION_FORMAT.open_file(files.projection)
        self._decoder = DECODER_FORMAT.open_file(files.decoder)
        self._prompt = open_checkpoint(files.prompt)
        configs = self._projection.config, self._decoder.config
        self.model = StreamedUpscaler(files.model, settings, registrar, between_blocks, *configs, files.loras)
        self._on_safe_path = False
        self._count_beside()
        self._check_files()
        self.plan: MemoryPlan | None = None
        self.record = RunRecord(settings.device)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.model.model.execution.dtype

    def take_safe_path(self) -> bool:
        """Compute with PyTorch's attention, and in bf16 or fp32 where it was fp16, from the next video on.

        False where it does so already.
        """
        masked = self._masked().name
        self._on_safe_path = True
        taken = self.model.take_safe_path() or self._masked().name != masked
        self._count_beside()
        return taken

    def leave_safe_path(self) -> None:
        """Compute as before `take_safe_path`, from the next video on; nothing where it was not taken."""
        self._on_safe_path = False
        self.model.leave_safe_path()
        self._count_beside()

    @torch.inference_mode()
    def frames(self, source: Iterator[Tensor], request: UpscaleRequest, size: tuple[int, int]) -> Iterator[Tensor]:
        """Large frames, uint8 `[t, H, W, 3]`, of a video's `source` of small ones of `size` (width, height).

        ValueError for a request that cannot be, PlanError for one that does not fit.
        """
        with self.opened(request, size) as stream:
            yield from made(stream, in_order(source, 0))

    @contextmanager
    def opened(
        self, request: UpscaleRequest, size: tuple[int, int], folder: Path | None = None
    ) -> Iterator[UpscaleStream]:
        """A video's stream, for as long as its networks are on the device.

        What RAM has no room for is in `folder` meanwhile (None: the system's for temporary files). ValueError where
        that has none either.
        """
        request.check()
        large = request.size(*size)
        self.plan = plan = self.planned(request, size)
        settings = self.settings
        with self.record.run(plan.limits), self.record.phase("denoise"), ExitStack() as stack:
            stack.callback(self._stop)
            stack.callback(self.progress.end)
            self.progress.begin("load")
            dtype, device = self.dtype, settings.device
            projection = stack.enter_context(at_work(partial(self._projection.build, dtype, device, only="decoder")))
            decoder = stack.enter_context(at_work(partial(self._decoder.build, dtype, device, only="decoder")))
            self.model.start_fitting(plan, self.record.add_spans)
            self.plan = self.model.plan
            self.record.uses(self.model)
            assert isinstance(plan.model, UpscaleFootprint)
            window = replace(plan.model.window_size(plan.work), dtype=dtype)
            windows = self._windows(stack, window, plan.model.windows_on_disk, folder)
            memory = DecoderMemory(settings.device, self.model.weights.budget, plan.model.parks_memory)
            stack.callback(memory.release)
            networks = Networks(self.model, self._text(), projection, decoder, self._masked())
            self.progress.begin("upscale")
            yield UpscaleStream(networks, Remembered(windows, memory), request, large)

    def planned(self, request: UpscaleRequest, size: tuple[int, int]) -> MemoryPlan:
        """The plan of a video of `size` (width, height); PlanError where it does not fit."""
        self.model.kept_windows = request.kept_windows
        work = upscale_work(self.model.config, *padded(request.size(*size)))
        limits = hold_limits(self.settings, self.model.model.execution, self.model.host_bytes)
        refusals = []
        for self.model.windows_on_disk, self.model.parks_memory in product((False, True), repeat=2):
            try:
                return self.model.make_plan(work, self._less_remembered(work, limits))
            except PlanError as error:
                refusals.append(error)
        raise refusals[-1]

    def _windows(self, stack: ExitStack, size: WindowSize, on_disk: bool, folder: Path | None) -> HostWindows:
        """What the transformer remembers, in RAM or on the disk, until the stack is closed."""
        place = None
        if on_disk:
            folder = folder or Path(tempfile.gettempdir())
            logger.warning(
                "what is remembered of earlier frames takes %s, for which there is too little RAM: it is kept in %s, "
                "which takes longer", in_gib(size.host_bytes), folder,
            )  # fmt: skip
            place = stack.enter_context(scratch_folder(folder))
        try:
            windows = HostWindows(size, self.settings.device, self.model.weights.budget, place)
        except OSError as error:
            raise ValueError(
                f"what is remembered of earlier frames takes {in_gib(size.host_bytes)}, and {folder} has no room for "
                f"it either ({error.strerror or error}): free some of the disk or of RAM, remember fewer windows, or "
                "upscale less"
            ) from error
        stack.callback(windows.release)
        return windows

    def _less_remembered(self, work: WorkSize, limits: Limits) -> Limits:
        """The same limits without the RAM that a run remembers in; PlanError where there is less."""
        if limits.ram_budget_bytes is None:
            return limits
        footprint = self.model.footprint()
        assert isinstance(footprint, UpscaleFootprint)
        remembered = footprint.remembered_bytes(work)
        left = limits.ram_budget_bytes - remembered
        if left < 0:
            raise PlanError(
                f"what {self.model.checkpoint.path.name} remembers of {work.width}x{work.height} takes "
                f"{in_gib(remembered)} of RAM, and {in_gib(limits.ram_budget_bytes)} are free: "
                "upscale less, or close other programs"
            )
        return replace(limits, ram_budget_bytes=left)

    def run_settings(self, request: UpscaleRequest) -> dict[str, Any]:
        """All that frames depend on beside the small ones."""
        files = (self.files.model, self.files.projection, self.files.decoder, self.files.prompt)
        return {
            "family": "flashvsr",
            "request": asdict(request),
            "files": [fingerprint(path) for path in files],
            "loras": [[lora_fingerprint(lora.path), lora.strength] for lora in self.files.loras],
            "arithmetic": {**self.model.arithmetic, "masked": self._masked().name},
        }

    def lora_reports(self) -> list[LoraReport]:
        """How much of each LoRA is applied."""
        return [lora.report for lora in self.model.weights.loras.loras]

    def report(self) -> RunReport:
        """What the last video used."""
        return self.record.report()

    def _stop(self) -> None:
        if self.settings.keep_loaded:
            self.model.stop()
        else:
            self.model.release()
        torch.cuda.empty_cache()

    def _masked(self) -> MaskedAttention:
        if self._on_safe_path:
            return GatheredBlocks()
        return select_masked(self.settings.device, self.dtype, self.model.config.head_dim)

    def _count_beside(self) -> None:
        """Have plans count the two small networks' weights."""
        beside = self._projection, self._decoder
        self.model.beside_bytes = sum(each.weight_bytes(self.dtype, only="decoder") for each in beside)

    def _text(self) -> Tensor:
        text = prompt_of(self._prompt)
        return text.to(self.settings.device, self.dtype)

    def _check_files(self) -> None:
        config, files = self.model.config, self.files
        if (config.in_channels, config.out_channels, config.model_type) != (16, 16, "t2v"):
            raise CheckpointError(
                f"{files.model}: this is a Wan {config.model_type} model of {config.in_channels} channels; expected "
                "FlashVSR's, of Wan 2.1 T2V 1.3B; choose FlashVSR1_1.safetensors or Wan2_1-T2V-1_3B_FlashVSR_…"
            )
        if self._projection.config.dim != config.dim:
            raise CheckpointError(
                f"{files.projection}: makes tokens of width {self._projection.config.dim} but {files.model.name} has "
                f"{config.dim}: give the files of one release of FlashVSR"
            )
        shape = prompt_shape(self._prompt)
        if shape[-1] != config.text_dim:
            raise CheckpointError(
                f"{files.prompt}: a prompt of width {shape[-1]} but {files.model.name} takes {config.text_dim}: choose "
                "FlashVSR's encoded prompt (Prompt.safetensors)"
            )


def prompt_shape(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The shape of the encoded prompt of a file. CheckpointError where there is none."""
    return checkpoint.tensors[_prompt_name(checkpoint)].shape


def prompt_of(checkpoint: Checkpoint) -> Tensor:
    """The encoded prompt `[1, L, dim]` of a file: its only tensor, or the one that is called context."""
    text = checkpoint.read(_prompt_name(checkpoint))
    return text if text.ndim == 3 else text[None]


def _prompt_name(checkpoint: Checkpoint) -> str:
    names = list(checkpoint.tensors)
    name = "context" if "context" in names else names[0] if len(names) == 1 else None
    info = None if name is None else checkpoint.tensors[name]
    if info is None or len(info.shape) not in (2, 3) or (len(info.shape) == 3 and info.shape[0] != 1):
        raise CheckpointError(
            f"{checkpoint.path}: no encoded prompt; expected a single tensor [1, tokens, width]; choose FlashVSR's "
            "Prompt.safetensors"
        )
    return info.name
