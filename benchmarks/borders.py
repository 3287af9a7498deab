"""The picture of the README that shows what decoding in parts changes: in blended tiles, and in strips of rows.

    python benchmarks/borders.py

A drawn clip goes through the demo's Wan VAE, whose weights are trained, in float32 on the CPU, and comes back in whole
frames, in tiles and in strips. Left the last frame, then twenty times what tiles and what strips make of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from demo.captions import Caption
from demo.dataset import ClipSize, draw_scenes, render_clips
from lowvram_video.vae.strips import Strips
from lowvram_video.vae.tiling import WHOLE, Tile, Way, decode_in
from lowvram_video.video.pictures import to_uint8
from lowvram_video.wanvideo.vae.checkpoint import WAN_FORMAT
from lowvram_video.wanvideo.vae.model import WanVAE
from PIL import Image, ImageDraw
from torch import Tensor

ROOT = Path(__file__).parent.parent
FRAMES, SIDE, ZOOM = 9, 96, 4
TILE, ROWS, AMPLIFIED = 64, 32, 20
GAP = 8


def drawn() -> Tensor:
    """A clip [1, 3, T, H, W] as the VAE was trained on."""
    scenes = draw_scenes([Caption("red", "ball", "right", "", "in the snow")], torch.Generator().manual_seed(2))
    return render_clips(scenes, ClipSize(FRAMES)) * 2 - 1


def last_frame(vae: WanVAE, latent: Tensor, way: Way) -> Tensor:
    """[3, H, W] in 0 ... 255."""
    pieces = [piece.clone() for piece in decode_in(vae, latent, way)]
    return (pieces[-1][0, :, -1].float() + 1) * 127.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "borders.png")
    options = parser.parse_args()
    vae = WAN_FORMAT.open_file(ROOT / "demo" / "wan_2.1_vae_demo.safetensors").build(torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        latent = vae.encode(drawn())
        whole = last_frame(vae, latent, WHOLE)
        panels = [("whole frames", whole)]
        for name, way in ((f"tiles of {TILE}", Tile(TILE)), (f"strips of {ROWS} rows", Strips(ROWS))):
            difference = (last_frame(vae, latent, way) - whole).abs()
            found = f"{name}: at most {float(difference.max()):.5f} of 255"
            print(found)
            panels.append((f"{found}, x{AMPLIFIED}", AMPLIFIED * difference))
    side = ZOOM * SIDE
    sheet = Image.new("RGB", (3 * side + 2 * GAP, side + 20), "white")
    for number, (title, panel) in enumerate(panels):
        frame = to_uint8((panel / 127.5 - 1)[None, :, None])[0].numpy()
        image = Image.fromarray(frame).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(image, (number * (side + GAP), 20))
        ImageDraw.Draw(sheet).text((number * (side + GAP) + 4, 4), title, fill="black")
    sheet.quantize(128).save(options.out, optimize=True)


if __name__ == "__main__":
    main()
