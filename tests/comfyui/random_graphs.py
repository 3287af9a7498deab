"""Random graphs (random_cases.py), interrupts and /free between them: our MODEL beside core's own, on a real server.

    python -m tests.comfyui.random_graphs --comfyui ~/ComfyUI --count 150 --out random_graphs.json

Each graph runs with either model, and the latents are compared; what fails with core's must fail with ours. The same
seed draws the same graphs. Exit status: number of those that are wrong.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import itertools
import json
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.network.model import WanModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..tiny import randomize
from .conftest import installations
from .random_cases import LORAS, MODELS, Builder, Case, drawn
from .server import Graph, PromptError, Server

LIMIT = 1e-3  # relative error of the latents
CONFIG = WanConfig("t2v", dim=256, ffn_dim=384, num_heads=2, num_layers=4)
LAYERS = {"self_attn.q": (256, 256), "self_attn.o": (256, 256), "cross_attn.v": (256, 256), "ffn.0": (384, 256)}


def compared(server: Server, builder: Builder, case: Case) -> dict[str, Any]:
    """What became of a case: the largest error of its latents, or what either said."""
    core = latents(server, builder.graph(case, ours=False))
    if case.interrupt is not None:
        interrupted(server, builder.graph(longer(case), ours=True), case.interrupt)
    if case.free is not None:
        server.post("/free", case.free)
    ours = latents(server, builder.graph(case, ours=True))
    found: dict[str, Any] = {"seed": case.seed, "nodes": [name for chain in case.chains for name, _ in chain]}
    found |= {"interrupted": case.interrupt is not None, "freed": case.free is not None}
    found |= {"swapped": any(settings for _, settings in case.swaps)}
    if isinstance(core, str) or isinstance(ours, str):
        said = {"core": core if isinstance(core, str) else "", "ours": ours if isinstance(ours, str) else ""}
        return found | said | {"right": bool(said["core"] and said["ours"])}
    same_shapes = [one.shape for one in core] == [one.shape for one in ours]
    error = max(relative_error(*pair) for pair in zip(ours, core, strict=True)) if same_shapes else float("inf")
    return found | {"error": error, "right": error <= LIMIT}


def longer(case: Case) -> Case:
    """The same with many steps, to be stopped.

    Without APG, which ComfyUI keeps with the step that it saw last: where that was its first one, the next run begins
    with it, with core's model as well.
    """
    other = copy.deepcopy(case)
    other.chains = [[(name, inputs) for name, inputs in chain if name != "APG"] for chain in case.chains]
    other.sampling["steps"] = 60
    other.sampling["seed"] += 1
    return other


def interrupted(server: Server, graph: Graph, seconds: float) -> None:
    prompt = server.queue(graph)
    time.sleep(seconds)
    server.post("/interrupt", {})
    server.wait(prompt)


def latents(server: Server, graph: Graph) -> list[Tensor] | str:
    """The saved latents, or the error in its first line."""
    try:
        outputs = server.run(graph)
    except PromptError as error:
        return said(error)
    files = [file for key in sorted(outputs) for file in outputs[key].get("latents", [])]
    folder = server.base / "output"
    paths = [folder / file["subfolder"] / file["filename"] for file in files]
    found = [load_file(path)["latent_tensor"] for path in paths]
    for path in paths:
        path.unlink()
    return found


def said(error: PromptError) -> str:
    """What a user would read, in its first line."""
    if isinstance(error.details, list):
        for kind, message in error.details:
            if kind == "execution_error":
                first = message["exception_message"].strip().partition("\n")[0]
                return f"{message['node_type']}: {message['exception_type']}: {first}"[:400]
    return json.dumps(error.details)[:400]


def relative_error(got: Tensor, want: Tensor) -> float:
    """inf where one is no number and the other is."""
    if not torch.equal(got.isfinite(), want.isfinite()):
        return float("inf")
    got, want = (tensor.nan_to_num(0.0, 0.0, 0.0) for tensor in (got, want))
    return float((got - want).norm() / want.norm().clamp_min(1e-12))


def make_files(models: Path) -> None:
    """Two models and LoRAs in three spellings, unless they are there."""
    for number, name in enumerate(MODELS):
        path = _place(models / "diffusion_models", name)
        if not path.exists():
            tensors = randomize(WanModel(CONFIG), number).state_dict()
            save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, path)
    generator = torch.Generator().manual_seed(1)
    for name in LORAS:
        save_file(_lora(name, generator), _place(models / "loras", name))


def _lora(name: str, generator: torch.Generator) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for block in range(CONFIG.num_layers):
        for layer, (rows, columns) in LAYERS.items():
            down = torch.randn(4, columns, generator=generator) / columns**0.5
            up = torch.randn(rows, 4, generator=generator) * 0.3
            path = f"blocks.{block}.{layer}"
            if "peft" in name:
                tensors |= {f"diffusion_model.{path}.lora_A.weight": down, f"diffusion_model.{path}.lora_B.weight": up}
            elif "kohya" in name:
                key = f"lora_unet_{path.replace('.', '_')}"
                tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
                tensors[f"{key}.alpha"] = torch.tensor(2.0)
            else:
                tensors[f"diffusion_model.{path}.diff"] = up @ down
                tensors[f"diffusion_model.{path}.diff_b"] = torch.randn(rows, generator=generator) * 0.1
    return tensors


def _place(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def results(server: Server, first: int, count: int) -> Iterator[dict[str, Any]]:
    """What became of cases in turn, until so many were made with either model."""
    builder, made = Builder(server.get("/object_info")), 0
    for seed in itertools.count(first):
        if made == count:
            return
        case = compared(server, builder, drawn(seed))
        made += "error" in case or not case["right"]
        yield case


def summary_of(cases: list[dict[str, Any]], seconds: float, version: str) -> dict[str, Any]:
    """Figures, and where they are of."""
    errors = [case["error"] for case in cases if "error" in case]
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": platform.processor() or platform.machine(),
        "comfyui": version,
        "compared": len(errors),
        "core_fails_and_ours_too": sum(bool(case.get("core")) and case["right"] for case in cases),
        "wrong": sum(not case["right"] for case in cases),
        "worst_error": max(errors, default=None),
        "interrupted": sum(case["interrupted"] for case in cases),
        "freed": sum(case["freed"] for case in cases),
        "swapped": sum(case["swapped"] for case in cases),
        "seconds": round(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, help="its folder (COMFYUI_DIR or ~/ComfyUI)")
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0, help="of the first; the others follow")
    parser.add_argument("--out", type=Path, default=Path("random_graphs.json"))
    options = parser.parse_args()
    found = [one for one in installations() if options.comfyui in (None, one.folder)]
    if not found:
        raise SystemExit("no ComfyUI in COMFYUI_DIR or ~/ComfyUI: give --comfyui")
    began, cases = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder) / "models")
        with Server(found[0].folder, found[0].python, Path(folder)) as server:
            for case in results(server, options.seed, options.count):
                cases.append(case)
                if not case["right"]:
                    print(case, flush=True)
    summary = summary_of(cases, time.monotonic() - began, found[0].version)
    options.out.write_text(json.dumps({**summary, "draws": cases}, indent=1), encoding="utf-8")
    print(json.dumps(summary, indent=1))
    raise SystemExit(min(summary["wrong"], 125))


if __name__ == "__main__":
    main()
