"""The whole measurement of a card, part by part; what is there when somebody stops it is kept."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..attention.backend import AttentionSpec
from ..attention.probe import THIS_MACHINE
from ..attention.select import judge_backends, select_attention
from ..fused.select import select_fused_ops
from ..memory.plan.limits import hold_allocator
from ..runtime.progress import Progress
from ..system.card_links import numbered
from ..system.card_profile import FORMAT, CardProfile, card_key
from ..system.dtypes import half_dtype
from . import attention, disk, link, products
from .attention import AttentionSizes, measure_attention
from .clock import free_bytes, memory_bytes
from .disk import measure_disk
from .forms import forms_of
from .link import measure_link
from .models import published_models
from .products import ProductSizes, measure_products
from .steps import predicted_steps


@dataclass(frozen=True)
class BenchSettings:
    """What is measured: on which device, in short (`quick`), and which folder of models is read (None: no disk).

    A GPU without a number becomes the current one: not all of torch.cuda takes one without.
    """

    device: torch.device
    quick: bool = False
    models: Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", numbered(self.device))


@dataclass(frozen=True)
class Sizes:
    """How large what is measured is."""

    products: ProductSizes
    attention: AttentionSizes
    copy_bytes: int
    read_bytes: int


FULL = Sizes(products.SIZES, attention.SIZES, link.COPY_BYTES, disk.READ_BYTES)
QUICK = Sizes(products.QUICK_SIZES, attention.QUICK_SIZES, link.QUICK_COPY_BYTES, disk.QUICK_READ_BYTES)
ON_CPU = Sizes(products.CPU_SIZES, attention.CPU_SIZES, link.QUICK_COPY_BYTES, disk.QUICK_READ_BYTES)


@dataclass
class Bench:
    """One measurement. `profile` is what there is so far; it is `complete` once `run` comes to its end."""

    settings: BenchSettings
    progress: Progress
    profile: CardProfile = field(init=False)

    def __post_init__(self) -> None:
        device, today = self.settings.device, datetime.date.today().isoformat()
        self.profile = CardProfile(FORMAT, card_key(device), today, memory_bytes(device), self.settings.quick, False)
        on_gpu = device.type == "cuda"
        self.sizes = (QUICK if self.settings.quick else FULL) if on_gpu else ON_CPU
        self.dtype = half_dtype(device) if on_gpu else torch.float32

    def run(self) -> CardProfile:
        """Measure everything. KeyboardInterrupt ends it; `profile` then has what was done."""
        device, settings = self.settings.device, self.settings
        with self._within_what_is_free():
            self._link(measure_link(device, self.sizes.copy_bytes))
            self._disk(settings.models)
            self._attention()
            self._products()
        self._steps()
        self.profile = replace(self.profile, complete=True)
        return self.profile

    def _link(self, rows: Iterator[link.LinkRow]) -> None:
        self.progress.begin("copies")
        for row in rows:
            self.profile = replace(self.profile, link=(*self.profile.link, row))
        self.progress.end()

    def _disk(self, models: Path | None) -> None:
        if models is None:
            return
        self.progress.begin("disk")
        for row in measure_disk(models, self.sizes.read_bytes):
            self.profile = replace(self.profile, disk=(*self.profile.disk, row))
        self.progress.end()

    def _attention(self) -> None:
        self.progress.begin("attention")
        spec = AttentionSpec(self.settings.device, self.dtype, attention.HEAD_DIM)
        backends = judge_backends(spec, replace(THIS_MACHINE, python="python"))  # a profile is shared: no folders in it
        for number, judged in enumerate(backends):
            for row in measure_attention(judged, self.sizes.attention, spec):
                self.profile = replace(self.profile, attention=(*self.profile.attention, row))
            self.progress.update(number + 1, len(backends))
        self.progress.end()

    def _products(self) -> None:
        self.progress.begin("products")
        for form in forms_of(self.settings.device):
            for row in measure_products(form, self.sizes.products, self.settings.device, self.dtype):
                self.profile = replace(self.profile, products=(*self.profile.products, row))
        self.progress.end()

    def _steps(self) -> None:
        """By the backend and the steps between products that a run would have."""
        self.progress.begin("steps")
        spec = AttentionSpec(self.settings.device, self.dtype, attention.HEAD_DIM)
        name = select_attention("auto", spec, replace(THIS_MACHINE, card=lambda device: self.profile)).name
        fused = select_fused_ops(self.settings.device).name != "eager"
        for row in predicted_steps(self.profile, published_models(), name, fused):
            self.profile = replace(self.profile, steps=(*self.profile.steps, row))
        self.progress.end()

    @contextmanager
    def _within_what_is_free(self) -> Iterator[None]:
        """PyTorch's allocator refuses what is beyond: what Windows' driver would take of RAM is no measurement."""
        device = self.settings.device
        if device.type != "cuda":
            yield
            return
        hold_allocator(device, max(free_bytes(device), memory_bytes(device) // 100))
        try:
            yield
        finally:
            hold_allocator(device, None)
