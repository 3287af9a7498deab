"""What weight formats and LoRAs cost in a whole denoising pass, all 40 blocks streamed.

python benchmarks/synthetic.py 14b fp8 /tmp/w/fp8.safetensors      (also Q8_0 and Q4_K to q8_0.gguf, q4_k.gguf,
python benchmarks/synthetic.py 14b lora64 /tmp/w/lora_a.safetensors  and lora_bb, lora_ccc, lora_dddd)
python benchmarks/quantized_runs.py /tmp/w
"""

from __future__ import annotations

import argparse
from pathlib import Path

from measure import run_cases
from streaming import Case, in_own_process

VRAM_GIB = 8.0
LORAS = ("lora_a", "lora_bb", "lora_ccc", "lora_dddd")


def cases(folder: Path) -> list[Case]:
    """The first one is what the others are compared with."""
    fp8, clip = str(folder / "fp8.safetensors"), (81, 480, 832)
    loras = tuple(str(folder / f"{name}.safetensors") for name in LORAS)
    size = {"vram_gib": VRAM_GIB, "blocks_to_swap": 40, "steps": 3}
    return [
        Case("fp8, bf16 products", fp8, *clip, **size),
        Case("fp8_fast", fp8, *clip, **size, quantization="fp8_fast"),
        Case("int8", fp8, *clip, **size, quantization="int8"),
        Case("Q8_0", str(folder / "q8_0.gguf"), *clip, **size),
        Case("Q4_K", str(folder / "q4_k.gguf"), *clip, **size),
        Case("fp8 + LoRA r64", fp8, *clip, **size, loras=loras[:1]),
        Case("fp8 + 4 LoRAs r64", fp8, *clip, **size, loras=loras),
        Case("fp8_fast + LoRA r64", fp8, *clip, **size, quantization="fp8_fast", loras=loras[:1]),
        Case("fp8_fast + 4 LoRAs", fp8, *clip, **size, quantization="fp8_fast", loras=loras),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    chosen = (case for case in cases(options.folder) if options.only in case.name)
    results, path = run_cases("quantized_runs", chosen, in_own_process)
    print(path)
    first = results[0].get("step")
    for r in results:
        if "error" in r:
            print(f"{r['name']:<22} FAILED {r['error']}")
            continue
        print(
            f"{r['name']:<22}{r['step']:>8.3f} s{r['step'] / first:>8.3f}x  VRAM {r['vram_gib_used']:.2f} GiB "
            f"(predicted {r['off_percent']:+.1f} %), load {r['load_seconds']:.1f} s, finite {r['finite']}"
        )


if __name__ == "__main__":
    main()
