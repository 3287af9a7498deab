"""Lists of devices as people write them: the cards that share each pass."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..system.card_links import numbered
from .settings import RunSettings, find_device, use_device

AUTO = "auto"


def parse_devices(text: str) -> tuple[torch.device, ...]:
    """The devices of a list such as "cuda:0,cuda:1"; "auto" is all GPUs that this machine has.

    ValueError for a device that this machine has not, for one that is there twice (but "cpu", whose cores they share),
    for unlike kinds, and where "auto" finds none.
    """
    if text.strip() == AUTO:
        if not torch.cuda.is_available():
            raise ValueError("devices auto: no GPU was found; name the devices, such as cuda:0,cuda:1")
        return tuple(torch.device("cuda", index) for index in range(torch.cuda.device_count()))
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ValueError(f"devices {text!r}: name devices with commas between them, such as cuda:0,cuda:1, or auto")
    devices = [find_device(name) for name in names]
    if len({device.type for device in devices}) > 1:
        raise ValueError(f"devices {text!r}: a pass is shared by GPUs alone, or by the CPU's threads: name one kind")
    if devices[0].type == "cuda":
        devices = [torch.device("cuda", device.index or 0) for device in devices]
        for device in devices:
            if devices.count(device) > 1:
                raise ValueError(f"devices {text!r}: {device} is there twice; name every card once")
    return tuple(devices)


def cards_beside(device: torch.device, text: str) -> tuple[torch.device, ...]:
    """The devices of a list beside this one, which runs already; none where "auto" finds no other.

    ValueError as in `parse_devices`, and for a list without this one.
    """
    if text.strip() == AUTO and (device.type != "cuda" or torch.cuda.device_count() < 2):
        return ()
    cards, device = list(parse_devices(text)), numbered(device)
    if device not in cards:
        raise ValueError(f"devices {text!r}: {device}, which the program runs on, must be among them")
    cards.remove(device)
    return tuple(cards)


def with_devices(settings: RunSettings, text: str) -> RunSettings:
    """The same settings on these devices, of which the first has what one card alone does: text, VAE, the latent."""
    first, *others = parse_devices(text)
    return replace(settings, device=use_device(str(first)), others=tuple(others))
