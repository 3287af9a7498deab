"""How a Wan pipeline decodes: on all cards that share its passes, or on the first, whole or in pieces."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..memory.plan.decode import strip_memory
from ..memory.plan.plan import MemoryPlan
from ..memory.stream.pinned import CudaRegistrar, Registrar
from ..runtime.settings import RunSettings
from ..system.device_errors import is_out_of_memory
from ..system.kernel_choice import brief
from ..team.team import Team
from ..vae.files import OpenVae
from ..vae.outbox import Finish
from ..vae.strips import Strips
from ..vae.tiling import OnChunk, Tile, Way, decode_in, retry_ways
from .vae.model import VAEConfig, WanVAE
from .vae.wave import CardStrips, decode_on_cards

logger = logging.getLogger(__name__)

DecodeWay = Way | CardStrips


@dataclass(frozen=True)
class Decoders:
    """The decoder on the first card, what the others' are read from, and the cards."""

    first: WanVAE
    opened: OpenVae[VAEConfig, WanVAE]
    settings: RunSettings
    team: Team | None

    def ways(self, plan: MemoryPlan) -> list[DecodeWay]:
        """The plan's, by all cards where it is in strips, then leaner ones for retries after the device ran out."""
        settings, decode = self.settings, plan.decode
        pinned = settings.device.type == "cuda" and settings.pinned_memory
        registrar = CudaRegistrar(settings.device) if pinned else None
        way: Way = Strips(decode.rows, decode.in_ram, registrar) if decode.rows else Tile(decode.tile)
        ways: list[DecodeWay] = [way, *retry_ways(self.first, way, (plan.work.height, plan.work.width), registrar)]
        shared = self._on_cards(plan, registrar)
        return ways if shared is None else [shared, *ways]

    def pieces(self, latent: Tensor, way: DecodeWay, on_chunk: OnChunk, finish: Finish) -> Iterator[Tensor]:
        """As `decode_in`. Where another card fails the first one makes the same strips, as long as it has room."""
        if not isinstance(way, CardStrips):
            yield from decode_in(self.first, latent, way, on_chunk, finish)
            return
        try:
            yield from self._on_all(latent, way, on_chunk, finish)
        except RuntimeError as error:  # before the first piece, which comes once all are made
            if is_out_of_memory(error):
                raise
            logger.warning("decoding %s failed, and the first card decodes alone: %s", way, brief(error))
            alone = Strips(way.rows, True, way.registrar)
            yield from decode_in(self.first, latent, alone, on_chunk, finish)

    def _on_all(self, latent: Tensor, way: CardStrips, on_chunk: OnChunk, finish: Finish) -> Iterator[Tensor]:
        assert self.team is not None
        logger.info("decoding %s", way)
        vaes = [self.first]
        try:
            for device in self.team.devices[1:]:
                vaes.append(self.opened.build(self.first.dtype, device, "decoder"))
            yield from decode_on_cards(vaes, self.team, latent, way, finish, on_chunk)
        finally:
            for vae in vaes[1:]:
                vae.to("meta")
            torch.cuda.empty_cache()

    def _on_cards(self, plan: MemoryPlan, registrar: Registrar | None) -> CardStrips | None:
        """The planned strips by all cards, bit for bit as the first would make them; None where it makes others.

        Whole frames round otherwise: where they fit, the first card makes them. None, too, where there is one card or
        no RAM for what waits.
        """
        rows, vae = plan.decode.rows, plan.model.vae
        if self.team is None or vae is None or not rows:
            return None
        waiting = strip_memory(vae, plan.work, plan.model.latent_channels, (rows, True), plan.limits.context_bytes).host
        ram = plan.limits.ram_budget_bytes
        return None if ram is not None and waiting > ram else CardStrips(rows, len(self.team.devices), registrar)
