"""What a moving preview costs: the pictures of a latent, by its channels and by a tiny decoder, beside a step.

python benchmarks/preview_cost.py --out /tmp/preview_cost.json

No model is loaded: steps are those of the results files named, and the decoder's numbers are random. Encoding and
sending happen in a thread of their own while the next step runs; what the step waits for is the making alone. A run
makes no more pictures than fit into 1 % of its time: "every" is the number of steps to a decoder's preview by that.
About 20 seconds on an H200.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lowvram_video.system.atomic_files import write_file
from lowvram_video.vae.tiny import TINY_16, TINY_48, TinyVAE
from lowvram_video.vae.tiny_files import TINY_FORMAT
from lowvram_video.vae.tiny_pictures import bytes_needed, small_latent, tiny_pictures
from lowvram_video.video.latent_pictures import latent_pictures
from measure import machine
from PIL import Image

LONGEST_SIDE = 512  # of ComfyUI's previews
SHARE = 0.01  # of a run's time, as nodes/bridge/moving_preview.py has it
# name, latent [C, T, h, w], seconds of its step on one H200 and the results file that says so
CASES = (
    ("Wan 14B, 832x480x81", (16, 21, 60, 104), 2.744, "streaming_480p_h200_2026-11-21.json"),
    ("Wan 14B, 1280x720x81", (16, 21, 90, 160), 11.047, "streaming_h200_2026-11-21.json"),
    ("Wan TI2V 5B, 1280x704x121", (48, 31, 44, 80), None, ""),
    ("FramePack, 640x608", (16, 9, 76, 80), 0.878, "framepack_h200_2026-11-28.json"),
)
DECODERS = {config.latent_channels: config for config in (TINY_16, TINY_48)}


@torch.inference_mode()
def by_channels(shape: tuple[int, ...], rounds: int, device: torch.device) -> dict[str, float]:
    """Milliseconds that a step waits for the pictures of its latent, and that a thread encodes one of them."""
    latent = random_latent(shape, device)
    factors = torch.randn(shape[0], 3, generator=torch.Generator().manual_seed(1)).mul(0.1).tolist()
    seconds, pictures = timed(lambda: latent_pictures(latent, factors, [0.0, 0.0, 0.0]), rounds, device)
    return {"making_ms": 1e3 * statistics.median(seconds[1:]), "encoding_ms": encoding_ms(pictures[0], rounds)}


@torch.inference_mode()
def by_decoder(shape: tuple[int, ...], rounds: int, device: torch.device, longest_side: int) -> dict[str, Any]:
    """The same by a tiny decoder, the first time apart, and the most memory that it had, counted and measured."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = DECODERS[shape[0]]
    opened = TINY_FORMAT.open_tensors(TinyVAE(config, dtype=dtype).state_dict())
    assert opened is not None
    latent = random_latent(shape, device)[None]

    def make() -> list[Image.Image]:
        return tiny_pictures(opened, small_latent(latent, config, longest_side), dtype)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    seconds, pictures = timed(make, rounds, device)
    found: dict[str, Any] = {
        "decoder_first_ms": 1e3 * seconds[0],
        "decoder_ms": 1e3 * statistics.median(seconds[1:]),
        "decoder_encoding_ms": encoding_ms(pictures[0], rounds),
        "decoder_size": list(pictures[0].size),
        "decoder_pictures": len(pictures),
        "decoder_counted_mib": bytes_needed(opened, small_latent(latent, config, longest_side), dtype) / 2**20,
    }
    if device.type == "cuda":
        found["decoder_peak_mib"] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return found


def random_latent(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, device=device, generator=torch.Generator(device).manual_seed(0))


def timed(
    make: Callable[[], list[Image.Image]], rounds: int, device: torch.device
) -> tuple[list[float], list[Image.Image]]:
    """Seconds of each of `rounds` and one more, and the last pictures, which end on the CPU: so they are waited for."""
    seconds = []
    pictures: list[Image.Image] = []
    for _ in range(rounds + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        pictures = make()
        seconds.append(time.perf_counter() - began)
    return seconds, pictures


def encoding_ms(picture: Image.Image, rounds: int) -> float:
    """Milliseconds in which ComfyUI enlarges a picture and makes it a JPEG."""
    scale = LONGEST_SIDE / max(picture.size)
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        picture.resize((round(picture.width * scale), round(picture.height * scale))).save(io.BytesIO(), "JPEG")
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds[1:])


def measured(case: tuple[Any, ...], rounds: int, device: torch.device, longest_side: int) -> dict[str, Any]:
    """One row of the results."""
    name, shape, step, source = case
    row = {"name": name, "latent": list(shape), **by_channels(shape, rounds, device)}
    row |= by_decoder(shape, rounds, device, longest_side)
    if step is not None and device.type == "cuda":
        row |= {"step_s": step, "step_of": source, "percent_of_step": row["making_ms"] / step / 10}
        row["decoder_percent_of_step"] = row["decoder_ms"] / step / 10
        row["decoder_every"] = math.ceil(row["decoder_ms"] / 1e3 / (SHARE * step))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--longest-side", type=int, default=LONGEST_SIDE, help="of a decoder's pictures, in pixels")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    device = torch.device(given.device)
    rows = [measured(case, given.rounds, device, given.longest_side) for case in CASES]
    found = {"date": datetime.date.today().isoformat(), "machine": machine(), "rounds": given.rounds, "rows": rows}
    write_file(given.out, json.dumps(found, indent=1).encode())
    head = ("", "channels ms", "% of step", "decoder ms", "first ms", "% of step", "every", "MiB", "counted")
    print("{:<28}{:>13}{:>11}{:>12}{:>10}{:>11}{:>7}{:>8}{:>9}".format(*head))
    for row in rows:
        share = [f"{row[key]:.3f}" if key in row else "-" for key in ("percent_of_step", "decoder_percent_of_step")]
        every, peak = row.get("decoder_every", "-"), round(row.get("decoder_peak_mib", 0)) or "-"
        print(
            f"{row['name']:<28}{row['making_ms']:>13.2f}{share[0]:>11}{row['decoder_ms']:>12.1f}"
            f"{row['decoder_first_ms']:>10.0f}{share[1]:>11}{every:>7}{peak:>8}{row['decoder_counted_mib']:>9.0f}"
        )
    print(f"all of it is in {given.out}")


if __name__ == "__main__":
    main()
