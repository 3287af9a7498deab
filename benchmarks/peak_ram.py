"""The highest RAM of a whole Wan 2.2 A14B video, on the command line and in a real ComfyUI server.

    python benchmarks/peak_ram.py --comfyui ~/ComfyUI --work /tmp/peak_ram

Both experts and umt5-xxl are random fp8 files of full size (36 GB, made once in --work), the VAE is bf16. The blocks
stream within --vram, once without a RAM budget and once with one. Held against: one expert's file and 2 GiB, or the
RAM budget. In ComfyUI more prompts with new text follow, for which the experts of the first are still there. It lets
go of earlier prompts' pictures, as it does by itself where less than 128 GiB of RAM are free; with more it keeps them
all, 0.1 GiB of each. Told of each phase: RSS, its anonymous memory, files and shared memory, and the mappings of the
highest.

    python benchmarks/peak_ram.py --comfyui ~/ComfyUI --where comfyui --ram 0 --link   # less: no RAM budget, one expert
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from comfyui_queue import find_python, make_base
from end_to_end import save_vae, spiece_model
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.text.encoder import UMT5Config
from measure import GIB, run_cases
from process_memory import RamWatch, phase_lines
from queue_server import ON_GPU, START_SECONDS, TINY, Graph, Server
from synthetic import CONFIGS, write_checkpoint, write_text_encoder

HIGH, LOW, TEXT, VAE = "high_fp8.safetensors", "low_fp8.safetensors", "umt5_fp8.safetensors", "wan_vae.safetensors"
FOLDERS = {HIGH: "diffusion_models", LOW: "diffusion_models", TEXT: "text_encoders", VAE: "vae"}
MARGIN_BYTES = 2 * GIB  # what a run may take beside one expert's file
STEPS = 4
CASE_SECONDS = 150
# GB of free RAM below which ComfyUI drops large outputs of this prompt, and all of earlier ones: more than there is.
LIKE_A_SMALL_MACHINE = "--cache-ram 2 16384"
PROMPTS = ("a cat surfs a wave", "a dog runs over a field at dawn", "rain falls on a river")
PHASES = ("encode", "load", "denoise", "decode", "end")  # of the command line, which says when one has ended


@dataclass(frozen=True)
class Size:
    """The files and the video."""

    expert: WanConfig
    text: UMT5Config
    width: int
    height: int
    num_frames: int


SIZES = {
    "full": Size(CONFIGS["14b"], UMT5Config(), 832, 480, 17),
    "tiny": Size(TINY, UMT5Config(64, attention_dim=64, ffn_dim=64, num_heads=1, num_layers=2), 64, 64, 5),
}


@dataclass(frozen=True)
class Case:
    """A run on the command line or in ComfyUI; `ram_gib` None has no RAM budget."""

    where: str
    ram_gib: float | None


@dataclass(frozen=True)
class Bench:
    """What every case shares; `base` has the files and is the server's folder."""

    size: Size
    base: Path
    vram_gib: float
    comfyui: Path | None
    python: Path
    flags: tuple[str, ...]
    baseline_bytes: int
    num_prompts: int

    def path(self, name: str) -> Path:
        return model_path(self.base, name)

    def run(self, case: Case) -> dict[str, Any]:
        """What a case took, and whether it kept within its bound; its error where it failed."""
        print(f"{case.where}, RAM budget {case.ram_gib}", flush=True)
        bound = self.path(HIGH).stat().st_size + MARGIN_BYTES if case.ram_gib is None else int(case.ram_gib * GIB)
        facts: dict[str, Any] = {"where": case.where, "ram_budget_gib": case.ram_gib, "bound_bytes": bound}
        began = time.monotonic()
        try:
            facts |= self.command_line(case.ram_gib) if case.where == "cli" else self.in_comfyui(case.ram_gib)
        except (RuntimeError, TimeoutError, OSError, subprocess.SubprocessError) as error:
            return facts | {"error": str(error)[-4000:]}
        peak = max(run["peak_rss_bytes"] for run in facts["runs"])
        return facts | {"peak_rss_bytes": peak, "holds": peak <= bound, "seconds": round(time.monotonic() - began, 1)}

    def command_line(self, ram_gib: float | None) -> dict[str, Any]:
        """`lowvram-video generate` in a process of its own."""
        size = self.size
        command = [
            sys.executable, "-m", "lowvram_video.cli", "generate", "--model", self.path(HIGH),
            "--model-low", self.path(LOW), "--text-encoder", self.path(TEXT), "--vae", self.path(VAE),
            "--prompt", PROMPTS[0], "--steps", STEPS, "--width", size.width, "--height", size.height,
            "--frames", size.num_frames, "--output", self.base / "output" / "peak_ram.mp4", "--overwrite",
        ]  # fmt: skip
        command += ["--vram-budget", self.vram_gib] if ON_GPU else []
        command += ["--ram-budget", ram_gib] if ram_gib else []
        path = self.base / "peak_ram.log"
        with path.open("w+", encoding="utf-8", errors="replace") as log:
            process = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log)
            try:
                with RamWatch(psutil.Process(process.pid), lambda: phase_by(path)) as watch:
                    code = process.wait(CASE_SECONDS)
            finally:
                process.kill()
            log.seek(0)
            said = log.read()
        if code:
            raise RuntimeError(f"exit code {code}: {said[-3000:]}")
        return {"idle_rss_bytes": self.baseline_bytes, "runs": [watch.figures()], "said": said[-3000:]}

    def in_comfyui(self, ram_gib: float | None) -> dict[str, Any]:
        """A prompt and those with other texts in a new server."""
        assert self.comfyui is not None
        server = Server(self.comfyui, self.python, self.base, self.flags)
        try:
            server.wait_until_up(time.monotonic() + START_SECONDS)
            process = psutil.Process(server.process.pid)
            idle, runs = process.memory_info().rss, []
            for seed, prompt in enumerate(PROMPTS[: self.num_prompts]):
                with RamWatch(process, lambda: running_node(server)) as watch:
                    run_prompt(server, self.graph(prompt, seed, ram_gib))
                runs.append(watch.figures())
            return {"idle_rss_bytes": idle, "runs": runs, "said": "\n".join(server.tail(40))}
        except (RuntimeError, TimeoutError) as error:
            raise RuntimeError(f"{error}\n{chr(10).join(server.tail(40))}") from error
        finally:
            server.stop()

    def graph(self, prompt: str, seed: int, ram_gib: float | None) -> Graph:
        """The example workflow of A14B without its LoRAs, its pictures saved one by one."""
        size = self.size
        nodes = {
            "clip": node("LowVRAMLoadClipGGUF", clip_name=TEXT, device="default"),
            "positive": node("CLIPTextEncode", text=prompt, clip=["clip", 0]),
            "negative": node("CLIPTextEncode", text=f"not {prompt}", clip=["clip", 0]),
            "latent": node("EmptyHunyuanLatentVideo", width=size.width, height=size.height, length=size.num_frames,
                           batch_size=1),
        }  # fmt: skip
        latent = ["latent", 0]
        for index, (name, file) in enumerate((("high", HIGH), ("low", LOW))):
            nodes |= self._expert(name, file, ram_gib)
            wires = {"model": [f"{name}_shift", 0], "positive": ["positive", 0], "negative": ["negative", 0]}
            nodes[f"{name}_sample"] = node(
                "KSamplerAdvanced", **wires, latent_image=latent, add_noise="disable" if index else "enable",
                noise_seed=seed, steps=STEPS, cfg=3.5, sampler_name="euler", scheduler="simple",
                start_at_step=index * STEPS // 2, end_at_step=10000 if index else STEPS // 2,
                return_with_leftover_noise="disable" if index else "enable",
            )  # fmt: skip
            latent = [f"{name}_sample", 0]
        decode = {"tile_size": 0, "temporal_chunk": 0, "keep_latent": False}
        return nodes | {
            "vae": node("VAELoader", vae_name=VAE),
            "decode": node("LowVRAMDecodeVideo", samples=latent, vae=["vae", 0], **decode),
            "save": node("SaveImage", images=["decode", 0], filename_prefix="peak_ram"),
        }

    def _expert(self, name: str, file: str, ram_gib: float | None) -> Graph:
        ours = {"compute_dtype": "auto", "attention_mode": "auto", "quantization": "none"}
        swap = {
            "blocks_to_swap": -1, "vram_budget_gb": self.vram_gib, "prefetch": 0, "ram_budget_gb": ram_gib or 0.0,
            "pinned_memory": True, "pass_other_models": False,
        }  # fmt: skip
        return {
            f"{name}_load": node("LowVRAMLoadWanModel", model_name=file, **ours),
            f"{name}_swap": node("LowVRAMBlockSwap", model=[f"{name}_load", 0], **swap),
            f"{name}_shift": node("ModelSamplingSD3", model=[f"{name}_swap", 0], shift=5.0),
        }


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def run_prompt(server: Server, graph: Graph) -> None:
    """Queue a prompt and wait; RuntimeError with ComfyUI's words where it fails."""
    prompt_id = server.post("/prompt", {"prompt": graph, "client_id": "bench"})["prompt_id"]
    end = time.monotonic() + CASE_SECONDS
    while time.monotonic() < end and server.process.poll() is None:
        entry = server.get(f"/history/{prompt_id}").get(prompt_id)
        if entry is not None and entry["status"]["status_str"] == "success":
            return
        if entry is not None:
            raise RuntimeError(f"the prompt failed: {str(entry['status'])[-2000:]}")
        time.sleep(0.2)
    raise RuntimeError(f"the prompt did not end in {CASE_SECONDS} s (exit code {server.process.poll()})")


def running_node(server: Server) -> str:
    """The node that runs, by its name in `Bench.graph`."""
    return server.get("/bench/state")["node"] or "between nodes"


def phase_by(log: Path) -> str:
    """The phase that the command line is in, by those that its log says have ended."""
    ended = re.findall(r"^(\w+): [\d.]+ s$", log.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return PHASES[PHASES.index(ended[-1]) + 1 if ended and ended[-1] in PHASES else 0]


def model_path(base: Path, name: str) -> Path:
    return base / "models" / FOLDERS[name] / name


def write_models(base: Path, size: Size, link: bool) -> None:
    """All files, unless they are there; the second expert is a copy of the first, or with `link` its own file."""
    device = "cuda" if ON_GPU else "cpu"
    for name in FOLDERS:
        path = model_path(base, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            continue
        began, part = time.monotonic(), path.with_suffix(".part")
        if name == HIGH:
            write_checkpoint(part, size.expert, "fp8", device)
        elif name == LOW:
            (os.link if link else shutil.copyfile)(model_path(base, HIGH), part)
        elif name == TEXT:
            write_text_encoder(part, size.text, device)
        else:
            save_vae(part, torch.bfloat16)
        part.rename(path)
        print(f"{name}: {path.stat().st_size / GIB:.2f} GiB in {time.monotonic() - began:.0f} s", flush=True)
    (base / "models" / FOLDERS[TEXT] / "spiece.model").write_bytes(spiece_model())
    if ON_GPU:
        torch.cuda.empty_cache()


_BASELINE = """
import psutil, torch
import lowvram_video.cli.main
if torch.cuda.is_available():
    one = torch.ones(256, 256, device="cuda", dtype=torch.bfloat16)
    (one @ one).sum().item()
print(psutil.Process().memory_info().rss)
"""


def baseline_bytes() -> int:
    """RSS of the command line before it opens a file, with a CUDA context and cuBLAS."""
    done = subprocess.run([sys.executable, "-c", _BASELINE], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, help="ComfyUI's folder; left out: the command line alone")
    parser.add_argument("--python", type=Path, help="ComfyUI's Python; its venv, or this one where it has none")
    parser.add_argument("--size", choices=list(SIZES), default="full" if ON_GPU else "tiny")
    parser.add_argument("--vram", type=float, default=8.0, help="GiB, for the transformer and what is beside it")
    parser.add_argument("--ram", type=float, default=8.0, help="GiB, the RAM budget; 0: no case with one")
    parser.add_argument("--where", default="cli,comfyui", help="the places, by commas")
    parser.add_argument("--prompts", type=int, default=2, help=f"in one server, at most {len(PROMPTS)}")
    parser.add_argument("--link", action="store_true", help="both experts are one file: less disk, RSS is the same")
    flags = LIKE_A_SMALL_MACHINE if ON_GPU else f"--cpu {LIKE_A_SMALL_MACHINE}"
    parser.add_argument("--flags", default=flags, help="of ComfyUI (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="a folder that is kept, with the files (default: temporary)")
    options = parser.parse_args()
    if options.comfyui is not None and not (options.comfyui / "main.py").is_file():
        parser.error(f"{options.comfyui} has no main.py: give ComfyUI's folder")
    return options


@contextlib.contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name).resolve()


def print_table(results: list[dict[str, Any]]) -> None:
    print(f"\n{'where':<9}{'RAM budget':>11}{'idle':>8}{'anonymous':>11}{'peak RSS':>10}{'bound':>8}  holds   GiB")
    for result in results:
        budget = "none" if result["ram_budget_gib"] is None else f"{result['ram_budget_gib']:g}"
        line = f"{result['where']:<9}{budget:>11}"
        if "error" in result:
            print(f"{line}  {result['error']}")
            continue
        for index, run in enumerate(result["runs"]):
            print(f"  {result['where']}, run {index + 1}", *phase_lines(run["phases"]), sep="\n")
        anonymous = max(run["peak_anonymous_bytes"] for run in result["runs"])
        cells = (
            (result["idle_rss_bytes"], 8),
            (anonymous, 11),
            (result["peak_rss_bytes"], 10),
            (result["bound_bytes"], 8),
        )
        line += "".join(f"{nbytes / GIB:>{width}.2f}" for nbytes, width in cells)
        print(f"{line}  {'yes' if result['holds'] else 'NO'}   {result['seconds']} s")


def main() -> None:
    options, began = parse_options(), time.monotonic()
    size = SIZES[options.size]
    with work_folder(options.work) as base:
        make_base(base)
        (base / "output").mkdir(exist_ok=True)
        write_models(base, size, options.link)
        comfyui = options.comfyui and options.comfyui.resolve()
        python = options.python or (find_python(comfyui) if comfyui else Path(sys.executable))
        flags = tuple(shlex.split(options.flags))
        bench = Bench(
            size, base, options.vram, comfyui, python.absolute(), flags, baseline_bytes(), options.prompts
        )  # fmt: skip
        places = [where for where in options.where.split(",") if comfyui or where == "cli"]
        budgets = (None, options.ram) if options.ram else (None,)
        cases = [Case(where, ram_gib) for where in places for ram_gib in budgets]
        sizes = {name: model_path(base, name).stat().st_size for name in FOLDERS}
        facts = {"size": options.size, "vram_gib": options.vram, "steps": STEPS, "flags": flags, "file_bytes": sizes}
        results, path = run_cases("peak_ram", cases, bench.run, baseline_rss_bytes=bench.baseline_bytes, **facts)
    print_table(results)
    print(f"{time.monotonic() - began:.0f} s in all; {path}")


if __name__ == "__main__":
    main()
