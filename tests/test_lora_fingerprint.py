"""What tells a LoRA from another: the file, and the configuration beside it by which it is scaled."""

import json
import os
from pathlib import Path

import pytest
import torch
from lowvram_video.framepack.pipeline import FramePackFiles, FramePackPipeline
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.wanvideo.identity import WanFiles, run_settings
from lowvram_video.wanvideo.request import WanRequest
from lowvram_video.wanvideo.streamed import StreamedWan
from lowvram_video.weights.files.fingerprint import fingerprint
from lowvram_video.weights.lora.file import LoraChoice
from lowvram_video.weights.lora.fingerprint import lora_fingerprint
from safetensors.torch import save_file

from .tiny import save_text_encoder, save_wan

CPU = RunSettings(device=torch.device("cpu"), dtype=torch.float32)


def save_lora(path: Path, layer: str = "blocks.0.self_attn.q", dim: int = 128) -> Path:
    pair = {"lora_A.weight": torch.ones(4, dim), "lora_B.weight": torch.ones(dim, 4)}
    save_file({f"{layer}.{part}": tensor for part, tensor in pair.items()}, path)
    return path


def configure(folder: Path, alpha: float) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": alpha}))


def test_a_configuration_beside_it_makes_it_another(tmp_path: Path) -> None:
    lora = save_lora(tmp_path / "l.safetensors")
    alone = lora_fingerprint(lora)
    assert alone == fingerprint(lora)  # as runs from before that know it
    configure(tmp_path, 8)
    eight = lora_fingerprint(lora)
    configure(tmp_path, 16)
    assert len({alone, eight, lora_fingerprint(lora)}) == 3
    os.utime(tmp_path / "adapter_config.json", (0, 0))
    configure(tmp_path, 8)
    assert lora_fingerprint(lora) == eight


def test_anothers_configuration_does_not(tmp_path: Path) -> None:
    """PEFT's own file is in the folder: the configuration is that one's."""
    lora, peft = save_lora(tmp_path / "l.safetensors"), save_lora(tmp_path / "adapter_model.safetensors")
    configure(tmp_path, 8)
    assert lora_fingerprint(lora) == fingerprint(lora) and lora_fingerprint(peft) != fingerprint(peft)


@pytest.mark.parametrize("beside", [True, False])
def test_the_key_of_a_wan_run(tmp_path: Path, beside: bool) -> None:
    files = WanFiles(
        save_wan(tmp_path / "wan.safetensors"),
        save_text_encoder(tmp_path / "umt5.safetensors"),
        tmp_path / "vae.safetensors",
        loras=(LoraChoice(save_lora(tmp_path / "l.safetensors")),),
    )
    told = []
    for alpha in (8, 16):
        if beside:
            configure(tmp_path, alpha)
        model = StreamedWan(files.model, CPU, loras=files.loras)
        told.append(run_settings(files, [model], WanRequest("a cat"), []))
    assert (told[0] != told[1]) == beside


def test_the_key_of_a_framepack_run(tmp_path: Path) -> None:
    pipeline = FramePackPipeline.__new__(FramePackPipeline)
    lora = save_lora(tmp_path / "l.safetensors")
    pipeline.files = FramePackFiles(tmp_path / "m", tmp_path / "v", (LoraChoice(lora, 0.5),))
    alone = pipeline.loras
    configure(tmp_path, 8)
    assert alone == (["l.safetensors", fingerprint(lora), 0.5],) and pipeline.loras != alone
