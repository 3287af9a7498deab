"""The pack in a real server: nodes appear, a video is made, interrupts and /free return memory."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from .server import Graph, PromptError, Server
from .tiny_files import PLAIN_MODEL, PLAIN_VAE

NODES = {
    "LowVRAMLoadWanModel": "Load Wan Video Model (Low VRAM)",
    "LowVRAMBlockSwap": "Block Swap (Low VRAM)",
    "LowVRAMTorchCompile": "Torch Compile Settings (Low VRAM)",
    "LowVRAMDecodeVideo": "Decode Video (Tiled, Low VRAM)",
    "LowVRAMPlan": "VRAM Plan",
    "LowVRAMMemoryReport": "Memory Report",
    "LowVRAMLoadLora": "Load LoRA (Low VRAM)",
    "LowVRAMResumableSampling": "Resumable Sampling (Low VRAM)",
    "LowVRAMLoadFramePackModel": "Load FramePack Model (Low VRAM)",
    "LowVRAMFramePackSampler": "FramePack Sampler (Low VRAM)",
}


SECONDS = 30
fresh = itertools.count(1000)  # what ComfyUI has not seen is not taken from its cache


@pytest.fixture(autouse=True)
def nothing_loaded(server: Server) -> None:
    free(server)


def free(server: Server) -> None:
    """Give all memory back, whatever ran before."""
    server.post("/free", {"unload_models": True, "free_memory": True})
    wait_for(lambda: loaded(server) == (0, 0), "models are still loaded")


def wait_for(condition: Callable[[], Any], failure: str) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, f"{failure} after {SECONDS} s"
        time.sleep(0.1)


def graph(steps: int = 2, seed: int = 1, size: int = 64) -> Graph:
    loader = {"model_name": PLAIN_MODEL.name, "compute_dtype": "auto", "attention_mode": "auto"}
    swap = {"blocks_to_swap": -1, "vram_budget_gb": 0.0, "prefetch": 0, "ram_budget_gb": 0.0, "pinned_memory": True}
    sampler = {"seed": seed, "steps": steps, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    latent = {"width": size, "height": size, "length": 5, "batch_size": 1}
    decode = {"tile_size": 0, "temporal_chunk": 0, "keep_latent": True}
    plan = {"width": 832, "height": 480, "length": 81, "guidance": True, "card_gb": 8.0}
    return {
        "1": _node("LowVRAMLoadWanModel", quantization="none", **loader),
        "2": _node("LowVRAMBlockSwap", model=["1", 0], pass_other_models=False, **swap),
        "3": _node("TestConditioning", seed=1),
        "4": _node("TestConditioning", seed=2),
        "5": _node("EmptyHunyuanLatentVideo", **latent),
        "6": _node("KSampler", model=["2", 0], positive=["3", 0], negative=["4", 0], latent_image=["5", 0], **sampler),
        "7": _node("VAELoader", vae_name=PLAIN_VAE.name),
        "8": _node("LowVRAMDecodeVideo", samples=["6", 0], vae=["7", 0], **decode),
        "9": _node("SaveImage", images=["8", 0], filename_prefix="tiny"),
        "10": _node("LowVRAMPlan", model=["2", 0], **plan),
        "11": _node("LowVRAMMemoryReport", model=["2", 0], after=["6", 0]),
        "12": _node("TestLoaded", nonce=seed, after=["11", 0]),
    }


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def loaded(server: Server) -> tuple[int, int]:
    """Models loaded in the server, and their bytes."""
    return counts(server.run({"1": _node("TestLoaded", nonce=next(fresh))})["1"])


def counts(output: dict[str, Any]) -> tuple[int, int]:
    count, size = output["text"][0].split("; ")
    return int(count), int(size)


def test_all_nodes_are_there(server: Server) -> None:
    known = server.get("/object_info")
    assert {name: known[name]["display_name"] for name in NODES if name in known} == NODES, server.tail(200)
    assert {known[name]["category"] for name in NODES} == {"LowVRAM Video"}
    assert PLAIN_MODEL.name in str(known["LowVRAMLoadWanModel"]["input"]["required"]["model_name"])


def test_a_video_is_made_with_plan_and_report(server: Server) -> None:
    outputs = server.run(graph())
    assert len(outputs["9"]["images"]) == 5
    assert "832x480" in outputs["10"]["text"][0]
    assert "denoise" in outputs["11"]["text"][0]
    assert outputs["11"]["images"]
    assert list((server.base / "output" / "latents").glob("*.latent"))


def test_an_interrupt_and_the_next_prompt(server: Server) -> None:
    prompt = server.queue(graph(steps=2000, seed=2))
    wait_for(lambda: re.search(r"\b[1-9]\d*/2000\b", server.tail(5)), "no step is done")
    server.post("/interrupt", {})
    began = time.monotonic()
    status = server.wait(prompt)["status"]
    assert time.monotonic() - began < 5
    assert any(kind == "execution_interrupted" for kind, _ in status["messages"])
    assert loaded(server)[1] == 0
    assert server.run(graph(seed=3))["9"]["images"]


def test_free_unloads(server: Server) -> None:
    assert counts(server.run(graph(seed=4))["12"])[1] > 0
    free(server)
    assert server.run(graph(seed=5))["9"]["images"]


def test_bad_input_leaves_the_queue_usable(server: Server) -> None:
    wrong = graph(seed=6)
    wrong["1"]["inputs"]["model_name"] = "absent.safetensors"
    with pytest.raises(PromptError, match=r"absent\.safetensors"):
        server.run(wrong)
    wrong = graph(seed=7)
    wrong["2"]["inputs"]["blocks_to_swap"] = 40
    with pytest.raises(PromptError, match="has 4 blocks"):
        server.run(wrong)
    assert server.run(graph(seed=8))["9"]["images"]


def test_memory_is_flat(server: Server) -> None:
    sizes = []
    for turn in range(20):
        server.run(graph(seed=20 + turn, size=64 if turn % 2 else 96))
        sizes.append(rss_mib(server.pid))
    print(f"server's RSS in MiB after twenty prompts: {', '.join(f'{size:.0f}' for size in sizes)}")
    # Single prompts are some 40 MiB off either way, by where the allocator's free memory lies; a leak adds up.
    assert median(sizes[10:]) - median(sizes[:10]) < 50  # 5 MiB a prompt


def rss_mib(pid: int) -> float:
    psutil = pytest.importorskip("psutil")
    return float(psutil.Process(pid).memory_info().rss / 2**20)


def test_the_log_has_no_trouble_of_ours(server: Server) -> None:
    log = server.log.read_text(encoding="utf-8", errors="replace")
    assert "IMPORT FAILED" not in log
    assert "memory leak" not in log
    assert (Path(server.base) / "custom_nodes").is_dir()
