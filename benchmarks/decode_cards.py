"""Wan's VAE in strips by one card and by several in the same run: seconds, and whether the video is the same.

    python benchmarks/decode_cards.py --out decode_cards.json           # all GPUs that there are
    python benchmarks/decode_cards.py --twice --out decode_twice.json   # one GPU that stands for two
    python benchmarks/decode_cards.py --tiny                            # 2 CPU "cards", a tiny VAE

Wan 2.1's VAE with random weights in bf16, 81 frames. What waits between strips lies in pinned RAM, for one card too.
The first decode of each is not counted: kernels are loaded, and steps recorded. About 60 s; a row is written when it is
done, and one that fails or takes more than `--limit` seconds is noted and passed over. One GPU that stands for two
shows bits, not speed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from lowvram_video.memory.stream.pinned import CudaRegistrar
from lowvram_video.team.team import Team
from lowvram_video.vae.files import runs_channels_last, to_channels_last
from lowvram_video.vae.strips import Strips
from lowvram_video.video.pictures import to_levels
from lowvram_video.wanvideo.vae.model import WAN21_VAE, WanVAE
from lowvram_video.wanvideo.vae.wave import CardStrips, decode_on_cards
from one_and_several import cards_of, make_parser
from surviving import Rows, is_child, make_all
from torch import Tensor

Size = tuple[int, int, int, int]  # latent frames, height, width, and rows of a strip
ROWS: dict[str, Size] = {
    "480p, 5 strips": (21, 60, 104, 96),
    "480p, 2 strips": (21, 60, 104, 240),
    "720p, 6 strips": (21, 90, 160, 120),
}
TINY_ROWS: dict[str, Size] = {"tiny": (5, 6, 4, 16)}


def random_vae(device: torch.device, tiny: bool) -> WanVAE:
    torch.manual_seed(0)
    config = replace(WAN21_VAE, encoder_dim=8, decoder_dim=8) if tiny else WAN21_VAE
    vae = WanVAE(config, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16).to(device)
    if runs_channels_last(device, vae.dtype):
        for weight in vae.parameters():
            weight.data = to_channels_last(weight.data)
    return vae


def wait_for(cards: Sequence[torch.device]) -> None:
    for card in cards:
        if card.type == "cuda":
            torch.cuda.synchronize(card)


@torch.inference_mode()
def measure(sizes: dict[str, Size], options: argparse.Namespace, cards: Sequence[torch.device]) -> None:
    done, vaes, team = Rows(options.out), [random_vae(card, options.tiny) for card in cards], Team(cards)
    registrar = CudaRegistrar(cards[0]) if cards[0].type == "cuda" else None
    for name, (frames, height, width, rows) in sizes.items():
        latent = torch.randn(1, 16, frames, height, width, generator=torch.Generator().manual_seed(1)).to(cards[0])

        def alone(latent: Tensor = latent, rows: int = rows) -> Iterator[Tensor]:
            return vaes[0].decode_strips(latent, Strips(rows, True, registrar), to_levels)

        def together(latent: Tensor = latent, rows: int = rows) -> Iterator[Tensor]:
            return decode_on_cards(vaes, team, latent, CardStrips(rows, len(cards), registrar), to_levels)

        with done.watched(name, options.limit):
            seconds: list[list[float]] = []
            videos: list[Tensor] = []
            for make in (alone, together):
                seconds.append([])
                for _ in range(1 + options.repeats):
                    began = time.perf_counter()
                    video = torch.cat(list(make()), 2)
                    wait_for(cards)
                    seconds[-1].append(time.perf_counter() - began)
                videos.append(video)
            one, several = (statistics.median(each[1:]) for each in seconds)
            done.add(
                {
                    "name": name,
                    "cards": len(cards),
                    "one": seconds[0],
                    "several": seconds[1],
                    "speed_up": one / several,
                    "same_bits": videos[0].equal(videos[1]),
                }
            )
            print(table(done.rows[-1:]), flush=True)
    team.close()


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'row':<20}{'one s':>9}{'several s':>11}{'speed-up':>10}{'bits':>6}"]
    for row in rows:
        one, several = (statistics.median(row[key][1:]) for key in ("one", "several"))
        bits = "same" if row["same_bits"] else "NOT"
        lines.append(f"{row['name']:<20}{one:>9.3f}{several:>11.3f}{row['speed_up']:>9.2f}x{bits:>6}")
    return "\n".join(lines)


def main() -> None:
    parser = make_parser(__doc__, limit_seconds=60.0, separators="semicolons")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    of_all = TINY_ROWS if options.tiny else ROWS
    wanted = list(of_all) if options.rows is None else options.rows.split(";")
    chosen = {name: size for name, size in of_all.items() if name in wanted}
    if not is_child():
        make_all(list(chosen), options.out, table)
        return
    measure(chosen, options, cards_of(options))


if __name__ == "__main__":
    main()
