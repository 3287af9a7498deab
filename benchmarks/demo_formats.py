"""What each weight format does to the demo model: the error of its velocity, and its score.

python benchmarks/demo_formats.py --num 24 [--jobs 2]

The GGUF files are made here, by the plain quantisers of tests/: llama.cpp's search for better scales would only help.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from lowvram_video.benchmarks.demo.score import make_clips, pick_captions, score
from lowvram_video.demo.files import DEMO_FILES, open_demo
from lowvram_video.memory.plan.footprint import Limits, WorkSize
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.wanvideo.streamed import StreamedWan
from lowvram_video.weights.files.open import open_checkpoint
from measure import save_results
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.quantizers import write_gguf

GGUF_TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K")
QUANTIZATIONS = ("fp8", "int8")
UNLIMITED = 1 << 60


@dataclass(frozen=True)
class Case:
    """One way to run the demo model."""

    name: str
    model: str
    quantization: str = "none"


@dataclass(frozen=True)
class Result:
    """`error` is that of the velocity relative to fp32's, mean of three noise levels; `right` clips of `num`."""

    name: str
    error: float
    right: int
    num: int
    seconds: float


def demo_gguf(path: Path, quant: str) -> Path:
    """The demo model with its blocks' linear weights in a packed type, the rest as it is."""
    checkpoint = open_checkpoint(DEMO_FILES.model)
    tensors = {}
    for name in checkpoint.tensors:
        values = checkpoint.read(name).float()
        is_packed = name.startswith("blocks.") and name.endswith(".weight") and values.ndim == 2
        tensors[name] = (values, quant if is_packed else "F16")
    return write_gguf(path, tensors)


@torch.inference_mode()
def velocities(case: Case) -> Tensor:
    """Of fixed noise at three noise levels, `[3, 16, T, H, W]`."""
    model = StreamedWan(Path(case.model), RunSettings(quantization=case.quantization))
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(3, 16, 3, 12, 12, generator=generator)
    text = torch.randn(3, 512, model.config.text_dim, generator=generator)
    model.start(model.make_plan(WorkSize(9, 96, 96, batch=3), Limits(UNLIMITED)))
    velocity = model(latent, torch.tensor([950.0, 600.0, 200.0]), text)
    model.release()
    return velocity


def measure(case: Case, num: int, exact: Tensor) -> Result:
    torch.set_num_threads(1)
    began = time.perf_counter()
    pipeline = open_demo(torch.device("cpu"), Path(case.model), case.quantization)
    verdicts = score(partial(make_clips, pipeline), pick_captions(num))
    difference = velocities(case) - exact
    error = float((difference.flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).mean())
    right = sum(verdict.all_right for verdict in verdicts)
    return Result(case.name, error, right, num, time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=24, help="clips per format")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    demo = str(DEMO_FILES.model)
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(options.jobs) as pool:
        cases = [Case("as it is (fp16)", demo), *(Case(name, demo, name) for name in QUANTIZATIONS)]
        cases += [Case(quant, str(demo_gguf(Path(folder) / f"demo_{quant}.gguf", quant))) for quant in GGUF_TYPES]
        exact = velocities(cases[0])  # fp16 weights in fp32 arithmetic
        results = []
        for result in pool.map(partial(measure, num=options.num, exact=exact), cases):
            results.append(result)
            percent = 100 * result.right / result.num
            print(
                f"{result.name:<18}error {result.error:.2e}   score {result.right:>3} of {result.num} = "
                f"{percent:>5.1f} %   {result.seconds:.0f} s",
                flush=True,
            )
    print(save_results("demo_formats", {"results": [asdict(result) for result in results]}))


if __name__ == "__main__":
    main()
