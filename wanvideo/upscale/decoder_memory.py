"""What the decoder remembers from one latent frame to the next: on the device, or in RAM where that has no room."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping

import torch
from torch import Tensor

from ...memory.stream.pinned import PinnedBudget, PinnedMemory
from ...vae.layouts import lies_channels_last


class DecoderMemory(MutableMapping[int, Tensor]):
    """Each block's last input, by the block's place; what a step changes counts from `commit` on.

    `parked`: they are in RAM, pinned as far as `budget` allows, and come to the device one at a time.
    """

    def __init__(self, device: torch.device, budget: PinnedBudget | None = None, parked: bool = False) -> None:
        self._device, self._memory, self._parked = device, PinnedMemory(budget), parked
        self._kept: dict[int, Tensor] = {}
        self._new: dict[int, Tensor] = {}  # of this step
        self._spare: dict[int, Tensor] = {}  # in RAM, of the step before

    @property
    def is_parked(self) -> bool:
        """Whether they are in RAM."""
        return self._parked

    def __getitem__(self, place: int) -> Tensor:
        tensor = self._new[place] if place in self._new else self._kept[place]
        if not self._parked:
            return tensor
        # a copy on a CPU, too: the next one takes its bytes
        return tensor.to(self._device, non_blocking=True, copy=True)

    def __setitem__(self, place: int, seen: Tensor) -> None:
        self._new[place] = self._in_ram(place, seen) if self._parked else seen

    def __delitem__(self, place: int) -> None:
        raise TypeError("what was remembered is replaced, not removed")

    def __iter__(self) -> Iterator[int]:
        return iter({**self._kept, **self._new})

    def __len__(self) -> int:
        return len({*self._kept, *self._new})

    def begin(self) -> None:
        """A step begins, perhaps once more: what the last attempt remembered is forgotten."""
        if self._parked:
            self._spare.update(self._new)
        self._new = {}

    def commit(self) -> None:
        """The step is done."""
        if self._parked:
            self._spare.update({place: self._kept[place] for place in self._new if place in self._kept})
        self._kept, self._new = {**self._kept, **self._new}, {}

    def park(self) -> None:
        """Be in RAM from now on. MemoryError where there is not so much: then nothing has changed."""
        if self._parked:
            return
        self._new = {}
        self._kept = {place: self._in_ram(place, seen) for place, seen in self._kept.items()}
        self._parked = True

    def tensors(self) -> dict[int, Tensor]:
        """What counts, on the CPU or on the device."""
        if self._parked and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return dict(self._kept)

    def take_up(self, tensors: Mapping[int, Tensor]) -> None:
        """Remember this instead; nothing where `tensors` are none."""
        self._new = {}
        self._kept = {
            place: self._in_ram(place, seen) if self._parked else seen.to(self._device)
            for place, seen in tensors.items()
        }

    def release(self) -> None:
        """Give all of it back; calling it again does nothing."""
        self._kept, self._new, self._spare = {}, {}, {}
        self._memory.unpin()

    def _in_ram(self, place: int, seen: Tensor) -> Tensor:
        """A copy, in the bytes of what was remembered before the last step where there are such."""
        there = self._new.get(place)
        if there is None:
            there = self._spare.pop(place, None)
        if there is None or there.shape != seen.shape:
            there = self._allocated(seen)
        there.copy_(seen, non_blocking=True)
        return there

    def _allocated(self, like: Tensor) -> Tensor:
        flat = self._memory.allocate(like.nbytes)[: like.nbytes].view(like.dtype)
        if not lies_channels_last(like):
            return flat.view(like.shape)
        batch, channels, height, width = like.shape
        return flat.view(batch, height, width, channels).permute(0, 3, 1, 2)
