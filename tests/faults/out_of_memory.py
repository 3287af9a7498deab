"""Out of VRAM at every place of ours that touches the device: the run goes on, leaner, to the same video.

The device is the CPU: an operation of PyTorch's raises what a full card does. A place is a line of the pack and the
phase that it is reached in; each is struck at one of its operations, drawn, in the first kind of run that comes by it,
and some are in further ones. Models plan as on a card for a large video, so that there are leaner plans, and stream
through a ring. Reading files is not struck, as it takes host memory, nor are operations on meta tensors, which take
none.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .command import OUR_OWN, PACK
from .files import Files
from .memory_cases import Case, Phase, cases
from .record import NOTHING, Known
from .table import Row

AGAIN = 8  # every so many-th place that was struck in another kind of run is struck again
MOST_PIXELS = 24  # of 255, that tiles of a VAE with random weights may differ by from a whole decoding
# functions below which files are read, or weights held: host memory on a card
HOST = {
    "read", "read_into", "_read", "read_tensor", "load_image", "load_tensors", "open_tokenizer", "state_dict",
    "_unload", "build", "_sections", "noise_levels", "section_noise", "flow_sigmas", "framepack_sigmas",
    "check_sigmas", "_place", "save_section", "_look", "HostCopy", "randn", "to_uint8", "_meta", "bind", "plain",
    "read_video", "from_uint8",
}  # fmt: skip

# functions whose own lines are in host memory, and not what they call
HOST_LINES = {
    ("wanvideo/conditioning.py", name)
    for name in ("image_channels", "control_channels", "vace_frames", "_with_frames", "_mask")
}
HOST_PLACES = {("framepack/run/generation.py", "run")}  # latents of sections are in host memory


class Strike(TorchDispatchMode):
    """Counts operations by their place, or raises at one of them."""

    def __init__(self, phase: Phase, at: int = 0) -> None:
        super().__init__()
        self._phase, self._at, self._count = phase, at, 0
        self.places: dict[tuple[str, str], list[int]] = {}
        self.struck = ""  # where it was

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        self._count += 1
        if self._at == self._count:
            self.struck = f"{self._phase.title}: {_place(sys._getframe(1))}"
            raise torch.cuda.OutOfMemoryError("CUDA out of memory (injected)")
        made = func(*args, **(kwargs or {}))
        if not self._at and _takes_memory(made, args):
            place = _place(sys._getframe(1))
            if place is not None:
                self.places.setdefault((self._phase.title, place), []).append(self._count)
        return made


def _takes_memory(made: Any, given: Sequence[Any]) -> bool:
    """Whether an operation has made a tensor of its own, that is not on meta."""
    if not isinstance(made, Tensor) or made.device.type == "meta":
        return False
    known = {
        each.untyped_storage().data_ptr() for each in given if isinstance(each, Tensor) and each.device == made.device
    }
    return made.untyped_storage().data_ptr() not in known


def _place(frame: FrameType | None) -> str | None:
    """The line of the pack that asked for it; None where a function of `HOST` did."""
    found = None
    while frame is not None:
        name, function = frame.f_code.co_filename, frame.f_code.co_name
        ours = name.startswith(PACK) and not any(part in name for part in OUR_OWN)
        if ours and (function in HOST or (name[len(PACK) + 1 :], function) in HOST_PLACES):
            return None
        if ours and found is None:
            if (name[len(PACK) + 1 :], function) in HOST_LINES:
                return None
            found = f"{name[len(PACK) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return found


def out_of_memory(
    files: Files, most_places: int | None = None, names: Sequence[str] = (), known: Known = NOTHING
) -> Iterator[Row]:
    """A row for each place; `most_places` new ones of each case, spread over all. `names` are of cases."""
    draw, seen = random.Random(5), set[tuple[str, str, str]]()
    for case in cases(files):
        if names and case.name not in names:
            continue
        with torch.inference_mode():
            whole = case.run(case.make())
        counter, pipeline = Strike(case.phase), case.make()
        case.phase.title = "start"
        with torch.inference_mode(), case.entered(counter):
            assert torch.equal(case.run(pipeline), whole)
        card = "another card's" if case.entered is not Case.entered else ""
        places = list(counter.places.items())
        new = [(place, counts) for place, counts in places if (card, *place) not in seen]
        seen |= {(card, *place) for place, _ in places}
        new += [each for each in places[::AGAIN] if each not in new]
        step = 1 if most_places is None else max(1, len(new) // most_places)
        for number, ((phase, place), counts) in enumerate(new[::step]):
            where, at = f"{phase}: {place}", draw.choice(counts)
            found = known.get((_fault(case), where))
            yield found or _struck(case, whole, where, at, number % AGAIN == 0)


def _fault(case: Case) -> str:
    return f"out of VRAM: {case.name}"


def _struck(case: Case, whole: Tensor, where: str, at: int, again: bool) -> Row:
    """`again`: the next run of the same pipeline is looked at too."""
    case.phase.title = "start"
    pipeline = case.make()
    strike = Strike(case.phase, at)
    try:
        with torch.inference_mode(), case.entered(strike):
            made = case.run(pipeline)
        worst = int((made.int() - whole.int()).abs().max()) if made.shape == whole.shape else 999
        seen = "same bits" if worst == 0 else "same but for tiles" if worst <= MOST_PIXELS else f"other by {worst}"
    except torch.cuda.OutOfMemoryError:
        seen = "ended, said so"
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
        seen = f"{type(error).__name__}: {str(error)[:80]}"
    left = [model for model in case.models(pipeline) if model.started]
    case.phase.title = "start"
    with torch.inference_mode():
        other = again and not torch.equal(case.run(pipeline), whole)
    if left or other:
        seen += "; memory not given back" if left else "; the next run is another"
    right = seen in ("same bits", "same but for tiles") and strike.struck == where
    return Row(_fault(case), where, right, seen, {"operation": at, "struck": strike.struck})
