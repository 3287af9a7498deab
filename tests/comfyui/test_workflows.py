"""Every example workflow, queued in a real server, ends in a saved video."""

from __future__ import annotations

from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from lowvram_video.benchmarks.demo.captions import Caption
from lowvram_video.benchmarks.demo.score import judge

from .node_types import NODE_TYPES
from .server import PromptError, Server
from .workflows import NAMES, for_test, load, size_nodes, to_prompt

DEMO_FRAMES = (17, 96, 96, 3)
# run with VAEs of full size in the newest ComfyUI, each once
FULL_SIZE = {"framepack_i2v", "wan2.2_ti2v_5B"}


def read_video(server: Server, outputs: dict[str, Any]) -> np.ndarray:
    """The frames `[T, H, W, 3]` of the one saved video, which other nodes may show too."""
    saved = [file for output in outputs.values() for file in output.get("images", ()) if file["type"] == "output"]
    videos = {(file["subfolder"], file["filename"]) for file in saved if file["filename"].endswith(".mp4")}
    assert len(videos) == 1, outputs
    path = server.base.joinpath("output", *videos.pop())
    reader = imageio_ffmpeg.read_frames(str(path), pix_fmt="rgb24")
    width, height = next(reader)["size"]
    return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


def test_the_nodes_are_as_the_workflows_assume(object_info: dict[str, Any]) -> None:
    for name, kind in NODE_TYPES.items():
        if name == "MarkdownNote":
            continue
        info = object_info[name]
        given = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        sockets = {key: value for key, value in kind.sockets if given[key][0] != value}
        assert not sockets, f"{name}: {sockets}"
        widgets = [key for key in given if key not in dict(kind.sockets)]
        ours = [widget.name for widget in kind.widgets]
        # core may add widgets at the end, ours are all in the files
        assert widgets[: len(ours)] == ours and (not name.startswith("LowVRAM") or widgets == ours), name
        outputs = list(zip(info["output_name"], info["output"], strict=True))
        assert outputs[: len(kind.outputs)] == list(kind.outputs), name


def shape_of(name: str) -> tuple[int, int, int, int]:
    """Of the video that a workflow makes in the tests' size."""
    if "framepack" in name:
        num_sections, frames_per_latent, window = 2, 4, 2
        start = 5 if "extend" in name else 1  # the frames that are given
        return (start + num_sections * frames_per_latent * window, 64, 64, 3)
    if name == "flashvsr_upscale_video":  # twice the example's 256 x 256
        return (5, 512, 512, 3)
    return (5, 96, 128, 3) if "upscale" in name else (5, 48, 64, 3)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("demo", "doctor")])
def test_a_workflow_makes_a_video(comfyui: Any, server: Server, object_info: dict[str, Any], name: str) -> None:
    graph = for_test(to_prompt(load(name), object_info), full_size=comfyui.is_newest and name in FULL_SIZE)
    try:
        outputs = server.run(graph)
    except PromptError:
        print(server.tail(60))
        raise
    frames = read_video(server, outputs)
    assert frames.shape == shape_of(name)
    assert frames.std() > 1, "the video is blank"
    print(f"{name}: {frames.shape}, mean {frames.mean():.0f}, std {frames.std():.0f}")
    if name == "flashvsr_upscale_video":  # has no MODEL
        return
    text = [line for output in outputs.values() for line in output.get("text", ())]
    assert any("predicted peak" in line for line in text), text
    assert any("denoise" in line and "phase" in line.lower() for line in text), text


@pytest.mark.parametrize("swap", [-1, 4])
@pytest.mark.parametrize("prompt", ["a red ball moves left", "a blue square moves right in the snow"])
def test_the_demo_shows_what_its_prompt_says(
    server: Server, object_info: dict[str, Any], prompt: str, swap: int
) -> None:
    graph = to_prompt(load("demo"), object_info)
    texts = [node["inputs"] for node in graph.values() if node["class_type"] == "CLIPTextEncode"]
    assert [inputs["text"] for inputs in texts] == ["a red ball moves left", ""]
    texts[0]["text"] = prompt
    for node in graph.values():
        if node["class_type"] == "LowVRAMBlockSwap":
            node["inputs"]["blocks_to_swap"] = swap
    assert [graph[number]["inputs"]["value"] for number in size_nodes(graph)] == [96, 96, 17]
    frames = read_video(server, server.run(graph))
    assert frames.shape == DEMO_FRAMES
    verdict = judge(torch.from_numpy(frames).float() / 255, Caption.parse(prompt))
    print(verdict)
    assert verdict.all_right
