"""What a moving preview costs: the pictures of a latent, made and encoded, beside a step of the model.

python benchmarks/preview_cost.py --out /tmp/preview_cost.json

No model is loaded: steps are those of the results files named. Encoding and sending happen in a thread of their own
while the next step runs; what the step waits for is the making alone.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from lowvram_video.system.atomic_files import write_file
from lowvram_video.video.latent_pictures import latent_pictures
from measure import machine

LONGEST_SIDE = 512  # of ComfyUI's previews
# name, latent [C, T, h, w], seconds of its step on one H200 and the results file that says so
CASES = (
    ("Wan 14B, 832x480x81", (16, 21, 60, 104), 2.744, "streaming_480p_h200_2026-11-21.json"),
    ("Wan 14B, 1280x720x81", (16, 21, 90, 160), 11.047, "streaming_h200_2026-11-21.json"),
    ("Wan TI2V 5B, 1280x704x121", (48, 31, 44, 80), None, ""),
    ("FramePack, 640x608", (16, 9, 76, 80), 0.878, "framepack_h200_2026-11-28.json"),
)


@torch.inference_mode()
def measured(shape: tuple[int, ...], rounds: int, device: torch.device) -> dict[str, float]:
    """Milliseconds that a step waits for the pictures of its latent, and that a thread encodes one of them."""
    generator = torch.Generator(device).manual_seed(0)
    latent = torch.randn(*shape, device=device, generator=generator)
    factors = torch.randn(shape[0], 3, generator=torch.Generator().manual_seed(1)).mul(0.1).tolist()
    making, encoding = [], []
    for _ in range(rounds + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        pictures = latent_pictures(latent, factors, [0.0, 0.0, 0.0])  # ends on the CPU, so it waits for the device
        made = time.perf_counter()
        picture = pictures[0]
        scale = LONGEST_SIDE / max(picture.size)
        picture.resize((round(picture.width * scale), round(picture.height * scale))).save(io.BytesIO(), "JPEG")
        making.append(made - began)
        encoding.append(time.perf_counter() - made)
    return {"making_ms": 1e3 * statistics.median(making[1:]), "encoding_ms": 1e3 * statistics.median(encoding[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    device = torch.device(given.device)
    rows: list[dict[str, Any]] = []
    for name, shape, step, source in CASES:
        row = {"name": name, "latent": list(shape), **measured(shape, given.rounds, device)}
        if step is not None and device.type == "cuda":
            row |= {"step_s": step, "step_of": source, "percent_of_step": row["making_ms"] / step / 10}
        rows.append(row)
    found = {"date": datetime.date.today().isoformat(), "machine": machine(), "rounds": given.rounds, "rows": rows}
    write_file(given.out, json.dumps(found, indent=1).encode())
    print(f"{'':<28}{'making ms':>12}{'encoding ms':>13}{'% of a step':>13}")
    for row in rows:
        share = f"{row['percent_of_step']:.3f}" if "percent_of_step" in row else "-"
        print(f"{row['name']:<28}{row['making_ms']:>12.2f}{row['encoding_ms']:>13.2f}{share:>13}")


if __name__ == "__main__":
    main()
