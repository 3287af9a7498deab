"""A real ComfyUI server under queued prompts: its memory in turns, interrupts, evictions, and under its own flags.

    python benchmarks/comfyui_queue.py --comfyui ~/ComfyUI --result benchmarks/results/comfyui_queue.json

Run it with a Python that has this pack (`pip install -e .`). It writes two random Wan checkpoints, starts ComfyUI's
main.py with the pack in its custom_nodes, and asks it over HTTP alone; text comes from the tests' stand-in node. A
scenario that fails is noted with the end of the server's log, and the next one starts with a new server.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lowvram_video.memory.report import write_atomically
from lowvram_video.wanvideo.config import WanConfig
from measure import GIB, Ballast, machine
from safetensors.torch import load_file
from synthetic import CONFIGS, write_checkpoint

PACK = Path(__file__).parents[1]
STAND_INS = PACK / "tests" / "comfyui" / "stand_ins"
NOT_COPIED = shutil.ignore_patterns(".*", "output", "build", "tests", "__pycache__", "*.egg-info")
START_SECONDS = 120
FLAT_SHARE = 0.01
RSS_NOISE_BYTES = 32 * 2**20  # a server's own garbage comes and goes; more than 1 % of a tiny model's server
ON_GPU = torch.cuda.is_available()
FAULTS = (OSError, RuntimeError, ValueError, LookupError, TypeError, AssertionError, http.client.HTTPException)

# a custom node pack without nodes: what only the server's process knows
PROBE = """
import comfy.model_management as mm
import torch
from aiohttp import web
from comfy_execution.progress import get_progress_state
from server import PromptServer

NODE_CLASS_MAPPINGS = {}


@PromptServer.instance.routes.get("/bench/state")
async def state(_):
    progress = get_progress_state()
    on_gpu = mm.get_torch_device().type == "cuda"
    patchers = [loaded.model for loaded in mm.current_loaded_models]
    return web.json_response({
        "pinned_bytes": int(mm.TOTAL_PINNED_MEMORY),
        "allocated_bytes": torch.cuda.memory_allocated() if on_gpu else 0,
        "reserved_bytes": torch.cuda.memory_reserved() if on_gpu else 0,
        "loaded": [[type(one).__name__, int(one.loaded_size())] for one in patchers if one is not None],
        "progress": {"prompt": progress.prompt_id, **{name: node["value"] for name, node in progress.nodes.items()}},
    })
"""

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


@dataclass
class Record:
    """What a scenario found: its figures, checks, and what went wrong."""

    figures: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    skipped: str = ""
    error: str = ""
    log: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def check(self, what: str, passed: bool, figure: object = None) -> None:
        self.checks.append({"check": what, "passed": bool(passed), "figure": figure})

    @property
    def verdict(self) -> str:
        if self.skipped:
            return "skipped"
        return "ok" if not self.error and all(check["passed"] for check in self.checks) else "FAILED"


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


# --- scenarios -------------------------------------------------------------------------------------------


def turns(bench: Bench, record: Record) -> None:
    """Two workflows in turn, each `num_turns` times: memory after each is the same from the third turn on.

    One prompt at a time, to look at the memory between them; at last four that are queued at once.
    """
    bench.server()
    rows = record.figures["rows"] = []
    models = {"large": bench.size.large, "small": bench.size.small}
    for turn in range(bench.size.num_turns):
        for name, model in models.items():
            ran = bench.run(bench.workflow(model, seed=turn, budget_gib=bench.size.budget_gib))
            bench.latent(ran)
            row = {"workflow": name, "turn": turn, "seconds": ran.seconds, "peak_bytes": ran.peak_bytes}
            rows.append(row | bench.state())
    for name in models:
        late = [row for row in rows if row["workflow"] == name][2:]
        for kind in ("vram_bytes", "rss_bytes", "pinned_bytes"):
            values = [row[kind] for row in late if row[kind] is not None] or [0]
            spread = max(values) - min(values)
            noise = RSS_NOISE_BYTES if kind == "rss_bytes" else 0
            flat = spread <= max(FLAT_SHARE * max(values), noise)
            record.check(
                f"{name}: {kind} flat within 1 %{' or 32 MiB' if noise else ''}", flat, spread / max(1, *values)
            )
    pair = [bench.workflow(model, seed=1, budget_gib=bench.size.budget_gib) for model in models.values()]
    again = [bench.workflow(model, seed=1, budget_gib=bench.size.budget_gib) for model in models.values()]
    prompts = [bench.queue(graph) for graph in (*pair, *again)]
    record.figures["queued"] = len(bench.server_now.get("/queue")["queue_pending"])
    ends = [bench.wait(prompt).status for prompt in prompts]
    record.check("four prompts queued at once", ends == ["success"] * 4, ends)
    _check_budget(bench, record, max(row["peak_bytes"] for row in rows))


def interrupt(bench: Bench, record: Record) -> None:
    """An interrupt while the weights are read, and one in mid-step: memory returned, the next prompt as before."""
    bench.server()
    budget = bench.size.budget_gib
    reference = bench.latent(bench.run(bench.workflow(bench.size.large, budget_gib=budget)))
    two_steps = bench.run(bench.workflow(bench.size.large, budget_gib=budget)).seconds
    loaded, freed = bench.state(), bench.free()
    record.figures |= {"loaded": loaded, "freed": freed}
    for moment, step, pause in (("while weights are read", 0, 0.3), ("in mid-step", 1, two_steps / 4)):
        prompt = bench.queue(bench.workflow(bench.size.large, steps=bench.size.endless_steps, budget_gib=budget))
        _wait_for_step(bench, prompt, step)
        time.sleep(pause)
        began = time.monotonic()
        bench.server_now.post("/interrupt", {})
        ran = bench.wait(prompt)
        seconds = time.monotonic() - began
        time.sleep(0.5)
        after = bench.state()
        record.figures[moment] = {"seconds": seconds, **after}
        interrupted = any(kind == "execution_interrupted" for kind, _ in ran.messages)
        record.check(f"{moment}: interrupted within 5 s", interrupted and seconds < 5, seconds)
        _check_returned(record, f"{moment}, interrupted", loaded, after, freed)
        again = bench.run(bench.workflow(bench.size.large, budget_gib=budget))
        error = _difference(bench.latent(again), reference)
        record.check(f"{moment}: the next prompt gives the same latent", error <= 1e-2, error)


def eviction(bench: Bench, record: Record) -> None:
    """Our large model and the small one with core's loader in turn on a small card: each evicts the other."""
    server = bench.server()
    bench.free()
    rows = record.figures["rows"] = []
    with bench.small_card():
        for turn in range(3):
            for name, graph in (
                ("ours", bench.workflow(bench.size.large, seed=turn)),
                ("core", bench.workflow(bench.size.small, seed=turn, core=True)),
            ):
                ran = bench.run(graph)
                bench.latent(ran)
                row = {"model": name, "turn": turn, "seconds": ran.seconds, "peak_bytes": ran.peak_bytes}
                rows.append(row | bench.state())
        freed = bench.free()
    record.figures["freed"] = freed
    held = {
        name: [sum(size for kind, size in row["loaded"] if (kind == OUR_PATCHER) is mine) for row in rows]
        for name, mine in (("ours", True), ("core", False))
    }
    record.figures["loaded_bytes"] = held
    record.check("the log has no error", "Traceback" not in server.log_text())
    if ON_GPU:
        record.check("core evicts ours", all(held["ours"][i + 1] < held["ours"][i] for i in (0, 2, 4)), held["ours"])
        record.check("ours evicts core", all(held["core"][i + 1] < held["core"][i] for i in (1, 3)), held["core"])
    loaded = max(rows, key=lambda row: row["vram_bytes"])
    _check_returned(record, "POST /free", loaded, freed, bench.idle)


def compiled(bench: Bench, record: Record) -> None:
    """Compiled blocks together with streaming, three seeds: no recompile after the first, and its speed."""
    server = bench.server()
    options = {"steps": 3, "budget_gib": bench.size.budget_gib}
    bench.latent(bench.run(bench.workflow(bench.size.large, **options)))
    plain = bench.run(bench.workflow(bench.size.large, **options))
    runs, recompiles = [], []
    for seed in (1, 2, 3):
        ran = bench.run(bench.workflow(bench.size.large, seed=seed, compiled=True, **options))
        latent = bench.latent(ran)
        if seed == 1:
            record.figures["difference_from_eager"] = _difference(latent, bench.latent(plain))
        runs.append(ran)
        recompiles.append(server.log_text().count("Recompiling function"))
    seconds = [ran.seconds for ran in runs]
    speed = {"seconds_per_step": seconds[-1] / 3, "eager_seconds_per_step": plain.seconds / 3}
    record.figures |= {"seconds": seconds, "recompiles": recompiles, **speed, **bench.state()}
    record.check("no recompile after the first seed", recompiles[-1] == recompiles[0], recompiles)
    record.check("the log has no error", "Traceback" not in server.log_text())
    _check_budget(bench, record, max(ran.peak_bytes for ran in runs))


def flagged(bench: Bench, record: Record, *flags: str, budget: bool = True) -> None:
    """The large model under ComfyUI's flags: speed once loaded, peaks, and the Memory Report."""
    bench.server(*flags)
    budget_gib = bench.size.budget_gib if budget else None
    first = bench.run(bench.workflow(bench.size.large, steps=1, budget_gib=budget_gib))
    graph = bench.workflow(bench.size.large, steps=4, budget_gib=budget_gib)
    ran = bench.run(graph)
    bench.latent(first)
    bench.latent(ran)
    state = bench.state()
    peak = max(first.peak_bytes, ran.peak_bytes)
    record.figures |= {"flags": flags, "seconds_per_step": ran.seconds / 4, "first_seconds": first.seconds}
    record.figures |= {"peak_bytes": peak, **state, "report": bench.report(graph).splitlines()}
    if budget:
        _check_budget(bench, record, peak)


def default(bench: Bench, record: Record) -> None:
    """No flags, within Block Swap's budget."""
    flagged(bench, record)


def reserve_vram(bench: Bench, record: Record) -> None:
    """So much reserved that a card of `reserve_leaves_gib` is left; no Block Swap."""
    if not ON_GPU:
        flagged(bench, record, "--reserve-vram", "1", budget=False)
        return
    bench.stop()
    free, _ = torch.cuda.mem_get_info()
    reserve = round(free / GIB - bench.size.reserve_leaves_gib, 1)
    flagged(bench, record, "--reserve-vram", str(reserve), budget=False)
    left = (free - record.figures["peak_bytes"]) / GIB
    record.check(f"{reserve} GiB stay free at the peak", left >= reserve, left)


def highvram(bench: Bench, record: Record) -> None:
    """All blocks stay on the card."""
    flagged(bench, record, "--highvram", budget=False)
    size = (bench.base / "models" / "diffusion_models" / bench.size.large.file).stat().st_size
    # the text's keys and values are made once, and the weights for that (a seventh) need not stay
    record.check("all blocks are in VRAM", record.figures["allocated_bytes"] >= 0.8 * size)


def lowvram(bench: Bench, record: Record) -> None:
    """All blocks are streamed."""
    flagged(bench, record, "--lowvram", budget=False)
    size = (bench.base / "models" / "diffusion_models" / bench.size.large.file).stat().st_size
    record.check("a fraction of the model is in VRAM", record.figures["allocated_bytes"] < 0.5 * size)


def disable_pinned_memory(bench: Bench, record: Record) -> None:
    """Streaming from pageable memory."""
    flagged(bench, record, "--disable-pinned-memory")
    record.check("nothing is pinned", record.figures["pinned_bytes"] == 0, record.figures["pinned_bytes"])


def cuda_malloc(bench: Bench, record: Record) -> None:
    """The driver's allocator, where it is not ComfyUI's default here."""
    if "cudaMallocAsync" in str(bench.servers.get("", {}).get("device")):
        record.skipped = "it is the default here"
    else:
        flagged(bench, record, "--cuda-malloc")


def disable_cuda_malloc(bench: Bench, record: Record) -> None:
    """PyTorch's own allocator."""
    flagged(bench, record, "--disable-cuda-malloc")


@dataclass(frozen=True)
class Scenario:
    """What runs, and for how long at most."""

    action: Callable[[Bench, Record], None]
    seconds: float
    on_cpu: bool = True
    own_server: bool = False


SCENARIOS = {
    "turns": Scenario(turns, 120),
    "default": Scenario(default, 60),
    "interrupt": Scenario(interrupt, 90),
    "eviction": Scenario(eviction, 90),
    "compiled": Scenario(compiled, 150),
    "reserve-vram": Scenario(reserve_vram, 75, own_server=True),
    "highvram": Scenario(highvram, 75, on_cpu=False, own_server=True),
    "lowvram": Scenario(lowvram, 75, on_cpu=False, own_server=True),
    "disable-pinned-memory": Scenario(disable_pinned_memory, 75, own_server=True),
    "disable-cuda-malloc": Scenario(disable_cuda_malloc, 75, own_server=True),
    "cuda-malloc": Scenario(cuda_malloc, 75, own_server=True),
}
OUR_PATCHER = "StreamedModelPatcher"


# --- parts of scenarios ----------------------------------------------------------------------------------


def _check_budget(bench: Bench, record: Record, peak_bytes: int) -> None:
    if ON_GPU:
        budget = bench.size.budget_gib
        record.check(f"never above the budget of {budget} GiB", peak_bytes <= budget * GIB, peak_bytes / GIB)


LIBRARY_BYTES = 384 << 20


def _check_returned(record: Record, what: str, loaded: State, after: State, empty: State) -> None:
    """Nothing pinned, nothing loaded, and 95 % of the VRAM between `loaded` and `empty` free again."""
    record.check(f"{what}: nothing is pinned", after["pinned_bytes"] == 0, after["pinned_bytes"])
    resident = sum(size for _, size in after["loaded"])
    record.check(f"{what}: nothing is loaded", resident == 0, resident)
    if ON_GPU:
        taken = loaded["vram_bytes"] - empty["vram_bytes"]
        share = (loaded["vram_bytes"] - after["vram_bytes"]) / max(1, taken)
        # what libraries took meanwhile (cuBLAS, core's own loader) stays in the process
        left = after["vram_bytes"] - empty["vram_bytes"]
        record.check(f"{what}: VRAM is returned", share >= 0.95 or left <= LIBRARY_BYTES, share)


def _wait_for_step(bench: Bench, prompt: str, step: int) -> None:
    """Until the sampler of a prompt has done so many steps (0: has begun)."""
    while time.monotonic() < bench.deadline:
        progress = bench.server_now.get("/bench/state")["progress"]
        if progress["prompt"] == prompt and progress.get("sample", -1) >= step:
            return
        time.sleep(0.02)
    raise TimeoutError(f"step {step} was not reached in the scenario's time")


def _difference(latent: torch.Tensor, reference: torch.Tensor) -> float:
    return float((latent - reference).abs().max() / reference.abs().max())


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


# --- setting up ------------------------------------------------------------------------------------------


def make_base(base: Path) -> None:
    """The server's folders, this pack and the stand-ins among its custom nodes."""
    nodes = base / "custom_nodes"
    for folder in (nodes / "bench_probe", base / "models" / "diffusion_models", base / "frontend"):
        folder.mkdir(parents=True, exist_ok=True)
    (nodes / "bench_probe" / "__init__.py").write_text(PROBE, encoding="utf-8")
    (base / "frontend" / "index.html").write_text("no frontend", encoding="utf-8")
    for target, name in ((PACK, "ComfyUI-LowVRAM-Video"), (STAND_INS, "stand_ins")):
        if (nodes / name).exists():
            continue
        try:
            (nodes / name).symlink_to(target.resolve(), target_is_directory=True)
        except OSError:  # Windows without developer mode
            shutil.copytree(target, nodes / name, ignore=NOT_COPIED)


def warm_up(base: Path) -> None:
    """Have all kernels that `write_models` needs on the device, so that this program's VRAM does not grow later."""
    if ON_GPU:
        for dtype in ("fp8", "bf16"):
            write_checkpoint(base / "warm_up.part", TINY, dtype, "cuda")
        (base / "warm_up.part").unlink()
        torch.cuda.empty_cache()


def write_models(base: Path, size: Size) -> None:
    """The two checkpoints, unless they are there."""
    device = "cuda" if ON_GPU else "cpu"
    for model in (size.large, size.small):
        path = base / "models" / "diffusion_models" / model.file
        if path.exists():
            continue
        began, part = time.monotonic(), path.with_suffix(".part")
        nbytes = write_checkpoint(part, model.config, model.dtype, device)
        part.rename(path)
        print(f"{model.file}: {nbytes / GIB:.2f} GiB in {time.monotonic() - began:.0f} s", flush=True)
    if ON_GPU:
        torch.cuda.empty_cache()


def run_scenario(bench: Bench, name: str, seconds_left: float) -> Record:
    """Run one; what goes wrong is in the record."""
    scenario, record, began = SCENARIOS[name], Record(), time.monotonic()
    if not ON_GPU and not scenario.on_cpu:
        record.skipped = "ComfyUI takes this flag on a GPU only"
        return record
    if seconds_left < 5:
        record.skipped = "no time is left"
        return record
    bench.deadline = began + min(scenario.seconds, seconds_left)
    if bench.launched is not None:
        bench.launched.mark = bench.launched.log.stat().st_size
    try:
        scenario.action(bench, record)
    except FAULTS as error:
        record.error = f"{type(error).__name__}: {error}"
    if record.verdict == "FAILED" and bench.launched is not None:
        record.log = bench.launched.tail()
    if record.error:
        bench.stop()
    record.seconds = time.monotonic() - began
    return record


def print_record(name: str, record: Record) -> None:
    """A scenario's line, and those of its rows, checks and trouble."""
    speed = record.figures.get("seconds_per_step")
    peak = record.figures.get("peak_bytes")
    line = f"{name:<24}{record.verdict:<9}{record.seconds:>7.1f} s"
    line += f"  {speed:.3f} s/step" if speed is not None else ""
    line += f"  peak {peak / GIB:.3f} GiB" if peak is not None else ""
    print(line + (f"  {record.skipped}" if record.skipped else ""))
    for row in record.figures.get("rows", []):
        label = f"{row.get('workflow', row.get('model'))} {row['turn']}"
        memory = (
            f"{kind} {(row[key] or 0) / GIB:.3f}"
            for kind, key in (("peak", "peak_bytes"), ("VRAM", "vram_bytes"), ("RSS", "rss_bytes"),
                              ("pinned", "pinned_bytes"))
        )  # fmt: skip
        print(f"    {label:<10}{row['seconds']:>8.2f} s  {'  '.join(memory)} GiB")
    for check in record.checks:
        print(f"    {'ok' if check['passed'] else 'NOT':<4}{check['check']}: {check['figure']}")
    if record.error:
        print(f"    {record.error}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="ComfyUI's folder")
    parser.add_argument("--python", type=Path, help="ComfyUI's Python; its venv, or this one where it has none")
    parser.add_argument("--size", choices=list(SIZES), default="full" if ON_GPU else "small")
    parser.add_argument("--scenarios", default=",".join(SCENARIOS), help="of them, separated by commas")
    parser.add_argument("--flags", default="" if ON_GPU else "--cpu", help="of ComfyUI, for every scenario")
    parser.add_argument("--seconds", type=float, default=1e9, help="for all of it; what comes later is skipped")
    parser.add_argument("--work", type=Path, help="a folder that is kept, with the checkpoints (default: temporary)")
    parser.add_argument("--result", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    unknown = set(options.scenarios.split(",")) - set(SCENARIOS)
    if unknown:
        parser.error(f"unknown scenarios {', '.join(sorted(unknown))}: choose from {', '.join(SCENARIOS)}")
    if not (options.comfyui / "main.py").is_file():
        parser.error(f"{options.comfyui} has no main.py: give ComfyUI's folder")
    return options


def find_python(comfyui: Path) -> Path:
    names = ("bin/python", "Scripts/python.exe")
    found = (comfyui / venv / name for venv in ("venv", ".venv") for name in names)
    return next((path for path in found if path.exists()), Path(sys.executable))


def main() -> None:
    options, began = parse_options(), time.monotonic()
    size = SIZES[options.size]
    folder = contextlib.nullcontext(options.work) if options.work else tempfile.TemporaryDirectory()
    with folder as name:
        base = Path(name).resolve()
        make_base(base)
        warm_up(base)
        comfyui = options.comfyui.resolve()
        python = options.python or find_python(comfyui)
        bench = Bench(size, comfyui, python.absolute(), base, tuple(shlex.split(options.flags)))
        results = {
            "machine": machine(), "size": options.size, "sizes": asdict(size), "flags": options.flags,
            "comfyui": (comfyui / "comfyui_version.py").read_text(encoding="utf-8").split('"')[-2],
        }  # fmt: skip
        records: dict[str, Record] = {}
        try:
            names = options.scenarios.split(",")
            if not SCENARIOS[names[0]].own_server:
                bench.launch()  # it starts while the checkpoints are written
            write_models(base, size)
            for name in names:
                records[name] = run_scenario(bench, name, options.seconds - (time.monotonic() - began))
                print_record(name, records[name])
                sys.stdout.flush()
                found = {key: asdict(record) | {"verdict": record.verdict} for key, record in records.items()}
                results |= {"servers": bench.servers, "seconds": time.monotonic() - began, "scenarios": found}
                write_atomically(options.result, json.dumps(results, indent=1).encode())
        finally:
            bench.stop()
    print(f"\n{'scenario':<24}{'verdict':<9}{'seconds':>8}{'s/step':>9}{'peak GiB':>10}{'pinned GiB':>12}")
    for name, record in records.items():
        speed, peak, pinned = (record.figures.get(key) for key in ("seconds_per_step", "peak_bytes", "pinned_bytes"))
        cells = (_cell(speed, 1), _cell(peak, GIB), _cell(pinned, GIB))
        print(f"{name:<24}{record.verdict:<9}{record.seconds:>8.1f}{cells[0]:>9}{cells[1]:>10}{cells[2]:>12}")
    print(f"{time.monotonic() - began:.0f} s in all; {options.result}")


def _cell(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:.3f}"


if __name__ == "__main__":
    main()
