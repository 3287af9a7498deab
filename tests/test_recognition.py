"""One recognition for all: `inspect`, `plan`, `convert` and the loaders say the same of a file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lowvram_video.cli.main import main
from lowvram_video.families.identify import describe, identify
from lowvram_video.families.table import family_of
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.system.atomic_files import name_beside, write_file
from lowvram_video.wanvideo.footprint import WAN22_VAE
from lowvram_video.wanvideo.streamed import StreamedWan
from lowvram_video.wanvideo.text.checkpoint import open_text_encoder
from lowvram_video.wanvideo.vae.checkpoint import WAN_FORMAT
from lowvram_video.weights.files.checkpoint import CheckpointError
from lowvram_video.weights.files.kinds import file_kind
from lowvram_video.weights.files.lora_keys import ENDINGS
from lowvram_video.weights.files.open import open_checkpoint
from lowvram_video.weights.linear.convert import convert, parts_left_out
from safetensors.torch import load_file

from .test_file_forms import T2V, VACE, Tensors, save, weights
from .tiny import load_wan, save_text_encoder, save_vae, save_wan

FUN_5B = replace(T2V, model_type="control", out_channels=48)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("stem", ["transformer.blocks.0.attn1.to_q", "lora_unet_blocks_0_self_attn_q"])
def test_every_ending_of_loras_tells_one(ending: str, stem: str) -> None:
    never_alone = (
        ending in (".alpha", ".dora_scale", ".lora_mid.weight", ".rescale", *GENERALIZED) or "magnitude" in ending
    )
    others = [f"{stem}.lora_down.weight"] if never_alone else []
    assert file_kind([f"{stem}{ending}", *others]).kind == "lora"


GENERALIZED = (".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight")


@pytest.mark.parametrize(("part", "kind"), [("lokr_w1", "LoKr"), ("hada_w1_a", "LoHa")])
def test_other_decompositions_are_told(tmp_path: Path, part: str, kind: str) -> None:
    path = save({f"lora_unet_blocks_0_self_attn_q.{part}": torch.zeros(4, 4)}, tmp_path / "lora.safetensors")
    assert kind in describe(identify(open_checkpoint(path)))


def cut(tensors: Tensors, start: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(start)}


# name -> (its tensors, what its loader is, or nothing where it is good)
WAN_FILES: dict[str, Callable[[], Tensors]] = {
    "good": weights,
    "good, prefixed": lambda: {f"model.diffusion_model.{name}": tensor for name, tensor in weights().items()},
    "without feed-forward": lambda: cut(weights(), "blocks.1.ffn"),
    "without a block": lambda: cut(weights(replace(T2V, num_layers=3)), "blocks.1."),
    "ReCamMaster": lambda: {**weights(), "blocks.0.cam_encoder.weight": torch.zeros(128, 12)},
    "adapter": lambda: {**weights(), "adapter.weight": torch.zeros(4, 4)},
    "other sizes": lambda: {**weights(), "blocks.0.ffn.2.weight": torch.zeros(128, 190)},
    "unknown channels": lambda: weights(replace(T2V, in_channels=46)),
}


@pytest.mark.parametrize("name", WAN_FILES)
def test_inspect_calls_good_what_loads(tmp_path: Path, name: str) -> None:
    path = save(WAN_FILES[name](), tmp_path / "wan.safetensors")
    said = describe(identify(open_checkpoint(path)))
    try:
        load_wan(path)
    except CheckpointError as error:
        assert not name.startswith("good")
        assert str(error).removeprefix(f"{path}: ") in said
    else:
        assert name.startswith("good") and "refused" not in said


def test_inspect_tries_the_loaders_of_encoders_and_vaes(tmp_path: Path) -> None:
    makers = {"umt5": (save_text_encoder, open_text_encoder), "vae": (save_vae, WAN_FORMAT.open_file)}
    for name, (make, opener) in makers.items():
        path = make(tmp_path / f"{name}.safetensors")
        opener(path)
        assert identify(open_checkpoint(path)).refusal == ""
        tensors = load_file(path)
        broken = next(
            key for key in tensors if key.endswith(("SelfAttention.k.weight", "upsamples.0.residual.2.weight"))
        )
        bad = save(
            {key: tensor for key, tensor in tensors.items() if key != broken}, tmp_path / f"bad_{name}.safetensors"
        )
        with pytest.raises(CheckpointError) as caught:
            opener(bad)
        refusal = identify(open_checkpoint(bad)).refusal
        assert refusal and refusal in str(caught.value)


@pytest.mark.parametrize(
    "more", [{"in_channels": 100}, {"in_channels": 148, "reference_channels": 48}], ids=["inpaint", "control"]
)
def test_fun_5b_is_planned_with_its_vae(tmp_path: Path, more: dict[str, int]) -> None:
    """A quarter of the tokens that the VAE of 2.1 would make. Comfy-Org/ComfyUI PR 9611."""
    path = save(weights(replace(FUN_5B, **more)), tmp_path / "fun.safetensors")
    assert StreamedWan(path, RunSettings()).footprint().vae is WAN22_VAE
    assert "Wan 2.2 VAE" in describe(identify(open_checkpoint(path)))


def test_fun_5b_is_planned_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(save(weights(replace(FUN_5B, in_channels=100)), tmp_path / "fun.safetensors"))
    assert main(["plan", path, "--vram-budget", "6", "--width", "848", "--height", "480"]) == 2
    assert "multiples of 32" in capsys.readouterr().err  # 848 suits the VAE of 2.1
    assert main(["plan", path, "--vram-budget", "6"]) == 0
    assert "1280x704" in capsys.readouterr().out  # the size that TI2V 5B is made for


def test_a_vace_module_is_planned_beside_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = weights(VACE)
    whole = save(tensors, tmp_path / "whole.safetensors")
    base, module = (
        save({key: tensors[key] for key in tensors if key.startswith("vace") == part}, tmp_path / f"{part}.safetensors")
        for part in (False, True)
    )
    texts = []
    for words in ([str(whole)], [str(base), "--vace-module", str(module)]):
        assert main(["plan", *words, "--vram-budget", "6"]) == 0
        texts.append(capsys.readouterr().out.replace(base.name, whole.name))
    assert texts[0] == texts[1]
    assert main(["plan", str(base), "--vace-module", str(base), "--vram-budget", "6"]) == 2
    assert "expected a VACE module" in capsys.readouterr().err


# --- convert ---------------------------------------------------------------------------------------------


def test_converting_an_all_in_one_file_names_what_it_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """modelscope/DiffSynth-Studio#689."""
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in weights().items()}
    tensors["model.diffusion_model.model_type.x"] = torch.zeros(1)
    tensors["vae.decoder.conv1.weight"] = torch.ones(4, 4, 3, 3, 3)
    tensors["vae.decoder.conv1.bias"] = torch.ones(4)
    tensors["text_encoders.umt5xxl.transformer.shared.weight"] = torch.ones(8, 8)
    source = save(tensors, tmp_path / "rapid-mega.safetensors")
    assert main(["convert", str(source), str(tmp_path / "out.safetensors"), "--to", "fp8", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "left out" in said and "1 tensor of text_encoders, 2 tensors of vae; rapid-mega.safetensors still" in said
    plain = save_wan(tmp_path / "plain.safetensors")
    assert parts_left_out(open_checkpoint(plain), family_of(plain).open_file(plain)) == ""


def test_names_of_the_longest_kind_can_be_written(tmp_path: Path) -> None:
    longest = tmp_path / ("y" * 243 + ".safetensors")
    source = save(weights(), tmp_path / "wan.safetensors")
    convert(family_of(source).open_file(source), longest, "fp8")
    load_wan(longest)
    write_file(tmp_path / ("é" * 125 + ".json"), b"{}")
    assert sorted(len(os.fsencode(file.name)) for file in tmp_path.iterdir()) == [15, 255, 255]


def test_names_beside_a_file_differ() -> None:
    names = {name_beside(Path("a" * length), ".partial").name for length in (240, 247, 248, 255)}
    assert len(names) == 4 and all(len(name) <= 255 and name.endswith(".partial") for name in names)
    assert re.fullmatch(r"a+\.[0-9a-f]{8}\.partial", name_beside(Path("a" * 255), ".partial").name)
    assert name_beside(Path("x/film.mp4"), ".part") == Path("x/film.mp4.part")
