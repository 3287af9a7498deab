"""Numbers that make no picture are refused where they are given or read, in one line that names them."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lowvram_video.cli.main import main
from lowvram_video.framepack.request import Sampling
from lowvram_video.wanvideo.identity import WanFiles
from lowvram_video.wanvideo.pipeline import WanPipeline
from lowvram_video.wanvideo.request import WanRequest, check_request
from lowvram_video.weights.files.checkpoint import CheckpointError
from lowvram_video.weights.lora.file import LoraChoice
from safetensors.torch import save_file

from .test_cli import arguments, refusal
from .test_framepack_generation import END, SAMPLING, material
from .tiny import save_files

BAD = [math.nan, math.inf, -math.inf, 1e30]
LAYER = "diffusion_model.blocks.0.self_attn.q"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> WanFiles:
    return save_files(tmp_path_factory.mktemp("files"))


def lora(path: Path, alpha: float | None = 4.0, header: str = "") -> Path:
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"{LAYER}.lora_A.weight": torch.randn(4, 128, generator=generator),
        f"{LAYER}.lora_B.weight": torch.randn(128, 4, generator=generator),
    }
    if alpha is not None:
        tensors[f"{LAYER}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, {"lora_adapter_metadata": header} if header else None)
    return path


@pytest.mark.parametrize("value", BAD)
def test_strengths_of_loras(files: WanFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float) -> None:
    path = lora(tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match=r"style\.safetensors: its strength is .*use a number from -100 to 100"):
        WanPipeline(replace(files, loras=(LoraChoice(path, value),)))
    pipeline = WanPipeline(replace(files, loras=(LoraChoice(path, 1.0),)))
    with pytest.raises(ValueError, match="its strength is"):
        pipeline.high.set_lora_strengths([value])
    line = refusal(capsys, arguments(files, tmp_path / "a.mp4", "--lora", f"{path}:{value}"))
    assert "strength" in line and not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("where", ["alpha", "header"])
def test_alphas_of_loras(files: WanFiles, tmp_path: Path, value: float, where: str) -> None:
    header = f'{{"r": 4, "lora_alpha": {str(value).replace("inf", "Infinity").replace("nan", "NaN")}}}'
    path = lora(tmp_path / "style.safetensors", *((value, "") if where == "alpha" else (None, header)))
    with pytest.raises(CheckpointError, match=r"style\.safetensors: .*download"):
        WanPipeline(replace(files, loras=(LoraChoice(path, 1.0),)))


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", ["guidance", "cfg", "shift", "strength", "cfg_rescale", "cache_threshold", "seconds"])
def test_numbers_of_framepack(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=r": use a number|expected|use"):
        material(**END).sections(replace(SAMPLING, **{name: value}))


@pytest.mark.parametrize("value", [*BAD, -0.1, 1.5])
def test_how_much_a_start_image_counts(value: float) -> None:
    with pytest.raises(ValueError, match=r"the start image's strength is .*: use a number from 0 to 1"):
        material(start_strength=value, **END).sections(SAMPLING)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", ["guidance", "guidance_high", "boundary", "control_strength"])
def test_numbers_of_wan(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} is .*: use a"):
        check_request(replace(WanRequest("a red ball", guidance=4.0), **{name: value}))


@pytest.mark.parametrize("flag", ["--distilled-guidance", "--cfg", "--teacache"])
def test_flags_of_framepack(tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    name = {"--distilled-guidance": "guidance", "--cfg": "cfg", "--teacache": "cache_threshold"}[flag]
    with pytest.raises(ValueError, match=r"is 1e\+30: use a number from 0 to 1000"):
        replace(Sampling(), **{name: 1e30}).check()
    for value in ("nan", "inf"):
        with pytest.raises(SystemExit):
            main(["generate", "--model", str(tmp_path / "m"), "--prompt", "x", flag, value])
        assert f"argument {flag}: '{value}' is no number from 0 up" in capsys.readouterr().err
