"""A whole run within a budget that a second process enforces: encode, denoise, decode, from full-size files.

    python benchmarks/synthetic.py 1.3b fp8 /tmp/1.3b_fp8.safetensors
    python benchmarks/end_to_end.py /tmp/1.3b_fp8.safetensors --vram 4 6 8

The VAE and the text encoder (full width, two layers) get random weights; what comes out is noise, at full cost.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import sentencepiece
import torch
from lowvram_video.memory.plan.footprint import GIB
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.wanvideo.identity import WanFiles
from lowvram_video.wanvideo.pipeline import WanPipeline
from lowvram_video.wanvideo.request import WanRequest
from lowvram_video.wanvideo.text.encoder import UMT5Config, UMT5Encoder
from lowvram_video.wanvideo.vae.model import WAN21_VAE, WanVAE
from measure import Ballast, save_results
from safetensors.torch import save_file


def save_vae(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The full-size Wan 2.1 VAE with random weights."""
    vae = WanVAE(WAN21_VAE)
    for parameter in vae.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        torch.nn.init.normal_(parameter, std=fan_in**-0.5)
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in vae.state_dict().items()}, path)
    return path


def spiece_model() -> bytes:
    """A sentencepiece model of a few words."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat surfs a wave", "a dog runs over a field at dawn"] * 20), model_writer=model,
        vocab_size=40, hard_vocab_limit=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def save_text_encoder(path: Path) -> Path:
    """A two-layer UMT5 of umt5-xxl's width, its tokenizer inside."""
    config = UMT5Config(vocab_size=64, num_layers=2)
    tensors = {}
    table = torch.empty(config.vocab_size, config.dim)
    for name, tensor in {"shared.weight": table, **UMT5Encoder(config).state_dict()}.items():
        std = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 1.0
        tensors[name] = (torch.randn(tensor.shape) * std).bfloat16()
    tensors["spiece_model"] = torch.frombuffer(bytearray(spiece_model()), dtype=torch.uint8)
    save_file(tensors, path)
    return path


def run(model: Path, folder: Path, vram_gib: float, steps: int) -> dict[str, object]:
    """One run in this process, which nothing else has used the GPU of."""
    files = WanFiles(model, folder / "umt5.safetensors", folder / "vae.safetensors")
    settings = RunSettings(device=torch.device("cuda", 0), vram_budget_gib=vram_gib)
    pipeline = WanPipeline(files, settings)
    request = WanRequest("a cat surfs a wave", num_steps=steps, width=832, height=480, num_frames=81)
    num_frames = sum(len(frames) for frames in pipeline.generate(request))
    report = pipeline.report()
    assert pipeline.plan is not None
    return {
        "vram_gib": vram_gib,
        "frames": num_frames,
        "vae_tile": pipeline.plan.decode.tile,
        "peaks_gib": {phase.name: report.vram_bytes(phase) / GIB for phase in report.phases},
        "seconds": {phase.name: phase.seconds for phase in report.phases},
        "table": report.table(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--vram", type=float, nargs="+", default=[4.0, 6.0, 8.0], help="GiB, one run each")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        print(json.dumps(run(options.model, options.folder, options.vram[0], options.steps)))
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        save_text_encoder(Path(folder) / "umt5.safetensors")
        save_vae(Path(folder) / "vae.safetensors")
        for vram_gib in options.vram:
            command = [sys.executable, __file__, str(options.model), "--folder", folder]
            command += ["--vram", str(vram_gib), "--steps", str(options.steps)]
            env = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
            with Ballast(vram_gib):
                done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
            sys.stderr.write(done.stderr[-2000:])
            if done.returncode:
                results.append({"vram_gib": vram_gib, "error": done.stderr.strip().splitlines()[-1][:300]})
            else:
                results.append(json.loads(done.stdout.splitlines()[-1]))
    path = save_results("end_to_end", {"runs": results})
    print(path)
    for result in results:
        print(f"in {result['vram_gib']} GiB:", result.get("error") or f"tile {result['vae_tile']}\n{result['table']}")


if __name__ == "__main__":
    main()
