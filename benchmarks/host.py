"""What a pass costs the host: milliseconds of a block, and how much of PyTorch and Python is called for it.

    python benchmarks/host.py --out host.json                       # without a GPU, 1, 2 and 4 "cards"; 1 minute
    python benchmarks/host.py --device cuda --cards 1,2 --out host.json      # on GPUs of this machine

Models have their real number of blocks, fp8 weights that are unpacked for each product, and all blocks streamed, but
are so narrow, and see so few tokens, that devices have next to nothing to do: what is timed is the host asking for it.
Where a card computes for longer than that the host is ahead, and nobody sees it; short clips, small models and several
cards are where it counts.

Without a GPU Triton's kernels are asked for as on one and then not run, attention is asked for as on a Hopper card, for
one token, and what PyTorch itself computes is tiny. What is not in it is the driver: events, streams and launches.
"ms" is the least of some passes, "CPU ms" the processor time of all threads in the least of them, which other work of
the machine touches less; both of a block and card. "operators" are PyTorch's, views too, and "functions" Python's, of
one card. "turns" are how often in a pass one card's thread wakes another's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from idle_triton import use_idle_triton
from lowvram_video.attention.sdpa import CUDNN_FIRST, Sdpa
from lowvram_video.framepack.network.config import FramePackConfig
from lowvram_video.framepack.streamed import StreamedFramePack
from lowvram_video.fused.triton_ops import TritonOps
from lowvram_video.memory.plan.plan import MemoryPlan
from lowvram_video.memory.stream.ring import DeviceRing
from lowvram_video.runtime.run_limits import hold_limits
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.system.atomic_files import write_file
from lowvram_video.wanvideo.footprint import wan_work
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.streamed import StreamedWan
from lowvram_video.weights.kernels.rows import TritonRowOps
from lowvram_video.weights.linear.linear import Linear
from lowvram_video.weights.linear.weight_format import Plain
from measure import machine
from several_cards import start_section
from several_rows import Row
from synthetic import write_checkpoint
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
WAN = WanConfig("t2v", 64, 128, 4, 40, text_dim=64, freq_dim=16, text_tokens=4)
FRAMEPACK = FramePackConfig(
    num_heads=4,
    head_dim=16,
    text_dim=64,
    pooled_dim=32,
    image_dim=48,
    rope_axes=(4, 6, 6),
)
NUM_BLOCKS = {"Wan": WAN.num_layers, "FramePack": FRAMEPACK.num_layers + FRAMEPACK.num_single_layers}
WAN_SIZE, FRAMEPACK_ROW = (32, 32, 1), Row("section", (32, 32, 33), 0, framepack=True)

Streamed = StreamedWan | StreamedFramePack
Pass = Callable[[], Tensor]
M = TypeVar("M", bound=Streamed)


class OneTokenSdpa(Sdpa):
    """PyTorch's attention as the host asks for it on a Hopper card, computed for one token."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.order = list(CUDNN_FIRST)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        super().attend(q[:, :1], k[:, :1], v[:, :1])
        return torch.empty_like(q)


class RingWan(StreamedWan):
    """Streams on a CPU too, where blocks else run where they lie."""

    def _make_ring(self, plan: MemoryPlan) -> DeviceRing:
        return super()._make_ring(plan) or DeviceRing(plan.blocks.ring_bytes, self.settings.device)


class RingFramePack(StreamedFramePack):
    """Streams on a CPU too."""

    def _make_ring(self, plan: MemoryPlan) -> DeviceRing:
        return super()._make_ring(plan) or DeviceRing(plan.blocks.ring_bytes, self.settings.device)


@dataclass(frozen=True)
class Measured:
    """Of a block and card: seconds of the clock and of processors. `turns` are a pass's."""

    wall: float
    cpu: float
    turns: int


def opened(name: str, folder: Path, cards: Sequence[torch.device]) -> Streamed:
    """The model on its cards; its file is made where it is missing."""
    path, is_wan = folder / f"{name}.safetensors", name == "Wan"
    if not path.exists():
        write_checkpoint(path, WAN if is_wan else FRAMEPACK, "fp8", "cpu")
    settings = RunSettings(cards[0], others=tuple(cards[1:]), blocks_to_swap=NUM_BLOCKS[name])
    model: Streamed = (RingWan if is_wan else RingFramePack)(path, settings)
    for each in (model, *model._others):
        if each.settings.device == CPU:
            as_on_a_card(each)
    return model


def as_on_a_card(model: Any) -> None:
    """Have what a GPU's host asks for, by kernels that do not run; in fp32, for a CPU to make small products fast."""
    execution = model.model.execution
    model.model.execution = replace(execution, dtype=torch.float32, attention=OneTokenSdpa(), ops=TritonOps())
    for layer in model.model.modules():
        if isinstance(layer, Linear):
            layer.format = Plain(TritonRowOps(fp8=True))


def started(model: Streamed) -> Pass:
    """The model, all of its blocks streamed, and a pass of it."""
    if isinstance(model, StreamedFramePack):
        return start_section(model, FRAMEPACK_ROW, text_tokens=4, image_tokens=4)
    work, device = wan_work(model.config, WAN_SIZE), model.settings.device
    plan = model.make_plan(work, hold_limits(model.settings, model.model.execution))
    model.start_fitting(replace(plan, choice=replace(plan.choice, cache_text_kv=True)))  # as larger ones have it
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(1, model.config.out_channels, *work.latent_size, generator=generator).to(device)
    text = torch.randn(1, WAN.text_tokens, WAN.text_dim, generator=generator).to(device)
    timestep = torch.full((1,), 700.0, device=device)
    return lambda: model(latent, timestep, text)


def measured(model: Streamed, make: Pass, rounds: int, num_blocks: int) -> Measured:
    """The least of some passes after two to warm up; on a GPU none begins before the last one has ended."""
    walls, cpus = [], []
    for _ in range(2 + rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        make()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
        for device in model.devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    turns = 0 if model.several is None else model.several.team.mail.num_turns
    asked = num_blocks * len(model.devices)
    return Measured(min(walls[2:]) / asked, min(cpus[2:]) / asked, turns)


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def num_operators(make: Pass) -> int:
    """PyTorch's operators that a pass on one card asks for."""
    with _Operators() as operators:
        make()
    return operators.count


def num_functions(make: Pass) -> int:
    """Python's functions that a pass on one card calls, of PyTorch and Triton too."""
    count = 0

    def seen(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(seen)
    try:
        make()
    finally:
        sys.setprofile(None)
    return count


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cards", default="1,2,4", help="numbers of cards, with commas between them")
    parser.add_argument("--models", default="Wan,FramePack")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--profile", action="store_true", help="say where a pass on one card spends it, by cProfile")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.device == "cpu":
        use_idle_triton()
    rows: list[dict[str, Any]] = []
    print(f"{'model':<12}{'cards':>6}{'ms':>9}{'CPU ms':>9}{'operators':>11}{'functions':>11}{'turns':>7}")
    with tempfile.TemporaryDirectory(prefix="lowvram-host-") as folder:
        for name in options.models.split(","):
            for count in map(int, options.cards.split(",")):
                cards = [CPU if options.device == "cpu" else torch.device("cuda", index) for index in range(count)]
                row = measure(name, Path(folder), cards, options)
                operators, functions = (shown(row[each]) for each in ("operators", "functions"))
                rows.append(row)
                print(
                    f"{name:<12}{count:>6}{row['ms']:>9.3f}{row['cpu_ms']:>9.3f}{operators:>11}{functions:>11}"
                    f"{row['turns']:>7}",
                    flush=True,
                )
    if options.out is not None:
        write_file(options.out, json.dumps({"machine": machine(), "rows": rows}, indent=1).encode())


def measure(name: str, folder: Path, cards: Sequence[torch.device], options: argparse.Namespace) -> dict[str, Any]:
    """One model on so many cards."""
    model, num_blocks = opened(name, folder, cards), NUM_BLOCKS[name]
    try:
        make = started(model)
        result = measured(model, make, options.rounds, num_blocks)
        alone = len(cards) == 1
        if alone and options.profile:
            profile(make)
        return {
            "model": name,
            "cards": len(cards),
            "ms": 1e3 * result.wall,
            "cpu_ms": 1e3 * result.cpu,
            "operators": num_operators(make) / num_blocks if alone else None,
            "functions": num_functions(make) / num_blocks if alone else None,
            "turns": result.turns,
        }
    finally:
        model.release()
        model.use_cards(())


def shown(count: float | None) -> str:
    return "" if count is None else f"{count:.0f}"


def profile(make: Pass, rounds: int = 5) -> None:
    import cProfile
    import pstats

    taken = cProfile.Profile()
    taken.enable()
    for _ in range(rounds):
        make()
    taken.disable()
    pstats.Stats(taken).sort_stats("tottime").print_stats(40)


if __name__ == "__main__":
    main()
