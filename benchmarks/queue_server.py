"""A real ComfyUI server for comfyui_queue.py: what runs in it, what it is asked, and its memory."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lowvram_video.wanvideo.network.config import WanConfig
from measure import Ballast
from safetensors.torch import load_file
from synthetic import CONFIGS

START_SECONDS = 120
ON_GPU = torch.cuda.is_available()

Graph = dict[str, dict[str, Any]]
State = dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A random model file; `dtype` is that of its blocks."""

    file: str
    config: WanConfig
    dtype: str


@dataclass(frozen=True)
class Size:
    """What is run: two models, the video, Block Swap's budget for the runs that have one, and the card for evictions.

    The budget is below the large model's size; `reserve_leaves_gib` is what --reserve-vram leaves to ComfyUI.
    """

    large: Checkpoint
    small: Checkpoint
    width: int
    height: int
    length: int
    budget_gib: float = 6.0
    card_gib: float = 7.0
    reserve_leaves_gib: float = 8.0
    num_turns: int = 10
    endless_steps: int = 200


TINY = WanConfig("t2v", dim=256, ffn_dim=384, num_heads=2, num_layers=4)
SIZES = {
    "full": Size(
        Checkpoint("14b_fp8.safetensors", CONFIGS["14b"], "fp8"),
        Checkpoint("1.3b_bf16.safetensors", CONFIGS["1.3b"], "bf16"),
        832, 480, 17,
    ),
    "small": Size(
        Checkpoint("tiny_fp8.safetensors", TINY, "fp8"),
        Checkpoint("tinier_bf16.safetensors", WanConfig("t2v", 128, 192, 1, 2), "bf16"),
        64, 64, 5, endless_steps=5000,
    ),
    # a CPU's: what is outside the blocks, in full size
    "wide": Size(
        Checkpoint("14b_1_fp8.safetensors", replace(CONFIGS["14b"], num_layers=1), "fp8"),
        Checkpoint("1.3b_1_bf16.safetensors", replace(CONFIGS["1.3b"], num_layers=1), "bf16"),
        64, 64, 5,
    ),
}  # fmt: skip


class Server:
    """ComfyUI's main.py in a process of its own; `base` holds its models, custom nodes and outputs."""

    def __init__(self, comfyui: Path, python: Path, base: Path, flags: tuple[str, ...]):
        self.flags, self.port = flags, _free_port()
        self.log = base / f"server_{self.port}.log"
        command = [
            str(python), "main.py", "--port", str(self.port), "--base-directory", str(base), "--disable-auto-launch",
            "--front-end-root", str(base / "frontend"), "--database-url", "sqlite:///:memory:", "--disable-api-nodes",
            *flags,
        ]  # fmt: skip
        environment = os.environ | {"TORCH_LOGS": "recompiles"}
        with self.log.open("wb", buffering=0) as log:
            log.write(f"{shlex.join(command)}\n".encode())
            self.process = subprocess.Popen(command, cwd=comfyui, env=environment, stdout=log, stderr=log)
        self.began = time.monotonic()
        self.mark = 0  # of the log, where the scenario began

    def wait_until_up(self, end: float) -> None:
        """Until it answers; RuntimeError where it ended or does not by `end`."""
        while self.process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(OSError):
                self.get("/system_stats")
                self.mark = self.log.stat().st_size
                return
            time.sleep(0.2)
        raise RuntimeError(f"ComfyUI with {self.flags} did not start (exit code {self.process.poll()})")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(8)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(15)

    def get(self, path: str) -> Any:
        return self._request(path)

    def post(self, path: str, values: Mapping[str, Any]) -> Any:
        return self._request(path, json.dumps(values).encode())

    def log_text(self) -> str:
        """The log since the scenario began."""
        return self.log.read_bytes()[self.mark :].decode("utf-8", errors="replace").replace("\r", "\n")

    def tail(self, num_lines: int = 60) -> list[str]:
        text = self.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
        return [line for line in text.splitlines() if line.strip()][-num_lines:]

    def _request(self, path: str, data: bytes | None = None) -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path}: {error.code}: {error.read().decode()[:2000]}") from error
        return json.loads(text) if text else None


@dataclass(frozen=True)
class Ran:
    """A prompt that ended: by ComfyUI's own clock, with the highest VRAM of the server meanwhile."""

    status: str
    seconds: float
    peak_bytes: int
    outputs: Mapping[str, Any]
    messages: list[Any]


class Bench:
    """The one server that runs, and what the scenarios ask of it."""

    def __init__(self, size: Size, comfyui: Path, python: Path, base: Path, flags: tuple[str, ...]):
        self.size, self.comfyui, self.python, self.base, self.flags = size, comfyui, python, base, flags
        self.others_bytes = _device_used()  # VRAM of other processes, this one among them
        self.deadline = 0.0
        self.launched: Server | None = None
        self.idle: State = {}
        self.servers: dict[str, dict[str, Any]] = {}  # what each says of itself, by its flags
        self._nonce = 0

    def launch(self, *flags: str) -> None:
        """Start a server with these flags beside the common ones, unless it runs already."""
        if self.launched is None or self.launched.flags != (*self.flags, *flags):
            self.stop()
            self.launched = Server(self.comfyui, self.python, self.base, (*self.flags, *flags))
            self.idle = {}

    def server(self, *flags: str) -> Server:
        """The server with these flags, ready."""
        self.launch(*flags)
        assert self.launched is not None
        if not self.idle:
            self.launched.wait_until_up(min(self.deadline, time.monotonic() + START_SECONDS))
            self.idle = self.state()
            device = self.launched.get("/system_stats")["devices"][0]["name"]
            dynamic = "DynamicVRAM support detected and enabled" in self.launched.log.read_text(errors="replace")
            facts = {"device": device, "dynamic_vram": dynamic, "start_seconds": time.monotonic() - self.launched.began}
            self.servers[" ".join(flags)] = facts | {"idle": self.idle}
        return self.launched

    def stop(self) -> None:
        if self.launched is not None:
            self.launched.stop()
        self.launched = None

    # Looking

    def vram_bytes(self) -> int:
        """VRAM of the server, its context included: all that came into use since this program began."""
        return max(0, _device_used() - self.others_bytes)

    def state(self) -> State:
        """Memory of the server now, bytes."""
        assert self.launched is not None
        inside = self.launched.get("/bench/state")
        return {"vram_bytes": self.vram_bytes(), **_process_memory(self.launched.process.pid), **inside}

    @contextlib.contextmanager
    def small_card(self) -> Iterator[None]:
        """Another process holds the card but for `card_gib`, which the idle server may use beside its context."""
        if not ON_GPU:
            yield
            return
        before = _device_used()
        with Ballast(self.size.card_gib):
            held = _device_used() - before
            self.others_bytes += held
            try:
                yield
            finally:
                self.others_bytes -= held

    # Prompts

    def workflow(
        self,
        model: Checkpoint,
        seed: int = 1,
        steps: int = 2,
        *,
        budget_gib: float | None = None,
        core: bool = False,
        compiled: bool = False,
    ) -> Graph:
        """A graph that ComfyUI has no cached latent of, even for a seed that it has seen. `core`: with its own loader.

        Without a budget there is no Block Swap: all is planned from what is free.
        """
        self._nonce += 1
        swap = {"prefetch": 0, "ram_budget_gb": 0.0, "pinned_memory": True, "pass_other_models": False}
        ours = {"compute_dtype": "auto", "attention_mode": "auto", "quantization": "none"}
        graph = {"load": _node("LowVRAMLoadWanModel", model_name=model.file, **ours)}
        if core:
            graph = {"load": _node("UNETLoader", unet_name=model.file, weight_dtype="default")}
        if budget_gib is not None:
            options = swap | {"blocks_to_swap": -1, "vram_budget_gb": budget_gib}
            graph["swap"] = _node("LowVRAMBlockSwap", model=[list(graph)[-1], 0], **options)
        if compiled:
            graph["compile"] = _node("LowVRAMTorchCompile", model=[list(graph)[-1], 0], **COMPILE)
        size = {"width": self.size.width, "height": self.size.height, "length": self.size.length, "batch_size": 1}
        sampler = {
            "noise_seed": seed, "steps": steps, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple",
            "add_noise": "enable", "return_with_leftover_noise": "disable", "start_at_step": 0,
            "end_at_step": 10000 - self._nonce,  # beyond the last step: all that it changes is the cache's key
        }  # fmt: skip
        wires = {"model": [list(graph)[-1], 0], "positive": ["positive", 0], "negative": ["negative", 0]}
        return graph | {
            "positive": _node("TestConditioning", seed=1),
            "negative": _node("TestConditioning", seed=2),
            "latent": _node("EmptyHunyuanLatentVideo", **size),
            "sample": _node("KSamplerAdvanced", **wires, latent_image=["latent", 0], **sampler),
            "save": _node("SaveLatent", samples=["sample", 0], filename_prefix="latents/bench"),
        }

    def queue(self, graph: Graph) -> str:
        return str(self.server_now.post("/prompt", {"prompt": graph, "client_id": "bench"})["prompt_id"])

    def wait(self, prompt_id: str) -> Ran:
        """Wait until a prompt ended, however it did."""
        peak, looked = 0, 0.0
        while time.monotonic() < self.deadline:
            peak = max(peak, self.vram_bytes())
            if time.monotonic() - looked > 0.05:
                entry = self.server_now.get(f"/history/{prompt_id}").get(prompt_id)
                looked = time.monotonic()
                if entry is not None:
                    return _ran(entry, peak)
            time.sleep(0.003)
        raise TimeoutError("the scenario's time is over")

    def run(self, graph: Graph) -> Ran:
        """Queue a prompt and wait; RuntimeError with ComfyUI's words where it fails."""
        ran = self.wait(self.queue(graph))
        if ran.status != "success":
            raise RuntimeError(f"the prompt ended with {ran.status}: {json.dumps(ran.messages)[-2000:]}")
        return ran

    def latent(self, ran: Ran) -> torch.Tensor:
        """The latent that a prompt saved; its file is deleted."""
        saved = ran.outputs["save"]["latents"][0]
        path = self.base / "output" / saved["subfolder"] / saved["filename"]
        latent = load_file(path)["latent_tensor"].float()
        path.unlink()
        if not torch.isfinite(latent).all():
            raise ValueError("the latent is not finite")
        return latent

    def report(self, graph: Graph) -> str:
        """The Memory Report's text of a prompt that has just run."""
        last = "swap" if "swap" in graph else "load"
        node = _node("LowVRAMMemoryReport", model=[last, 0], after=["sample", 0])
        return str(self.run(graph | {"report": node}).outputs["report"]["text"][0])

    def free(self) -> State:
        """`POST /free` as the menu's "Unload models and clear cache" does; the state after."""
        self.server_now.post("/free", {"unload_models": True, "free_memory": True})
        end = time.monotonic() + 10
        while self.state()["loaded"] and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(1)
        return self.state()

    @property
    def server_now(self) -> Server:
        assert self.launched is not None
        if self.launched.process.poll() is not None:
            raise RuntimeError(f"ComfyUI ended with exit code {self.launched.process.returncode}")
        return self.launched


COMPILE = {
    "backend": "inductor", "fullgraph": False, "mode": "default", "dynamic": "auto",
    "compile_transformer_blocks_only": True, "dynamo_cache_size_limit": 64, "dynamo_recompile_limit": 128,
    "force_parameter_static_shapes": False,
}  # fmt: skip


def _ran(entry: Mapping[str, Any], peak_bytes: int) -> Ran:
    messages = entry["status"]["messages"]
    times = [values["timestamp"] / 1000 for _, values in messages if "timestamp" in values]
    seconds = times[-1] - times[0] if times else 0.0
    return Ran(entry["status"]["status_str"], seconds, peak_bytes, entry["outputs"], messages)


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def _device_used() -> int:
    """VRAM in use by all processes."""
    if not ON_GPU:
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def _process_memory(pid: int) -> dict[str, int | None]:
    """RAM of a process as Linux has it; None elsewhere. The driver's pinned pages are seldom counted as VmPin."""
    names = {"VmRSS": "rss_bytes", "RssAnon": "anonymous_bytes", "RssFile": "file_bytes", "VmPin": "vm_pin_bytes"}
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return dict.fromkeys(names.values())
    values = {name: text for name, _, text in (line.partition(":") for line in lines)}
    return {ours: int(values.get(name, "0").split()[0]) * 1024 for name, ours in names.items()}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
