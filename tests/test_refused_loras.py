"""LoRA files that are refused: by name, and each with a way out that works."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.wanvideo.streamed import StreamedWan
from lowvram_video.weights.files.checkpoint import CheckpointError
from lowvram_video.weights.lora.file import Lora, LoraChoice
from safetensors.torch import load_file, save_file
from torch import Tensor

from .loras import AB, DIM, FFN, diffusers_name, make_factors, save_lora, save_merged
from .tiny import save_wan

Q = "blocks.0.self_attn.q"


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wan(tmp_path_factory.mktemp("wan") / "wan.safetensors", num_layers=1)


def opened(wan: Path, lora: Path) -> Lora:
    return StreamedWan(wan, RunSettings(), loras=[LoraChoice(lora)]).weights.loras.loras[0]


def refused(wan: Path, lora: Path) -> str:
    with pytest.raises(CheckpointError) as refusal:
        opened(wan, lora)
    print(refusal.value)
    text = str(refusal.value)
    assert str(lora) in text and "expected" in text
    return text


def pair(stem: str, rank: int = 4) -> dict[str, Tensor]:
    return {f"{stem}.{AB[0]}": torch.randn(rank, DIM) / 10, f"{stem}.{AB[1]}": torch.randn(DIM, rank)}


def saved(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, path, metadata)
    return path


UNKNOWN = {
    "VeRA": ("vera_lambda_b", "vera_lambda_d"),
    "OFT of PEFT": ("oft_R.weight",),
    "BOFT of PEFT": ("boft_R", "boft_s"),
    "IA3": ("ia3_l",),
    "AdaLoRA": ("lora_A", "lora_B", "lora_E"),
    "FourierFT": ("fourierft_spectrum",),
    "HRA": ("hra_u",),
    "RandLora": ("randlora_lambda", "randlora_gamma"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_decompositions_that_are_not_known(kind: str, wan: Path, tmp_path: Path) -> None:
    """Way out: the model with it merged, as PEFT writes it."""
    tensors = {f"base_model.model.{Q}.{end}": torch.ones(DIM, DIM) for end in UNKNOWN[kind]}
    text = refused(wan, saved(tmp_path / "lora.safetensors", tensors))
    assert f"a {kind}" in text and "merge_and_unload" in text
    merged = save_merged(wan, tmp_path / "merged.safetensors", make_factors(layers=[Q]))
    assert StreamedWan(merged, RunSettings()).config.num_layers == 1


def test_a_control_lora(wan: Path, tmp_path: Path) -> None:
    """Way out: a model that takes a control video."""
    stem = "diffusion_model.patch_embedding"
    more = {
        f"{stem}.lora_A.weight": torch.randn(4, 32, 1, 2, 2),
        f"{stem}.lora_B.weight": torch.randn(DIM, 4, 1, 1, 1),
        f"{stem}.reshape_weight": torch.tensor([DIM, 32, 1, 2, 2]),
    }
    lora = saved(tmp_path / "control.safetensors", {**pair(f"diffusion_model.{Q}"), **more})
    text = refused(wan, lora)
    assert "a control LoRA, which makes patch_embedding wider: [128, 32, 1, 2, 2], the model has [128, 16" in text
    tensors = load_file(wan)
    tensors["patch_embedding.weight"] = torch.randn(DIM, 32, 1, 2, 2)
    control = saved(tmp_path / "fun_control.safetensors", tensors)
    assert StreamedWan(control, RunSettings()).config.model_type == "control"
    report = opened(control, lora).report  # made for it, it changes no shape
    assert report.num_applied == report.num_keys == 5


def config(**entries: object) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in entries.items()})}


# What a header says -> what the refusal says, and a header that is taken.
HEADERS: dict[str, tuple[dict[str, str], str, dict[str, str]]] = {
    "another rank": (config(r=8, lora_alpha=16), "says rank 8 of blocks.0.attn1.to_q, its", config(r=4, lora_alpha=16)),
    "no JSON": ({"lora_adapter_metadata": "{"}, "lora_adapter_metadata cannot be read", {}),
    "no number": (config(r=4, lora_alpha="much"), "could not convert string to float", config(r=4)),
    "no finite alpha": (config(r=4, lora_alpha=math.nan), "nan is no finite number", config(r=4)),
    "no finite rank": (config(r=math.inf, lora_alpha=4), "cannot be read", config(r=4)),
    "no pattern": (config(r=4, alpha_pattern={"(": 1}), "cannot be read", config(r=4, alpha_pattern={"to_q": 1})),
    "PiSSA": (
        config(r=4, lora_alpha=4, init_lora_weights="pissa_niter_4"),
        "began as pissa_niter_4, which takes its first weights out of the model",
        config(r=8, rank_pattern={"to_q": 4}, lora_alpha=8, init_lora_weights=True),  # what PEFT's conversion writes
    ),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_by_which_nothing_can_be_scaled(kind: str, wan: Path, tmp_path: Path) -> None:
    stated, said, right = HEADERS[kind]
    tensors = pair(f"transformer.{diffusers_name(Q)}")
    assert said in refused(wan, saved(tmp_path / "lora.safetensors", tensors, stated))
    assert opened(wan, saved(tmp_path / "again.safetensors", tensors, right)).report.num_applied == 2


def test_a_configuration_of_another_lora_in_the_folder(wan: Path, tmp_path: Path) -> None:
    """Way out: to remove it; beside PEFT's own file it is that one's alone."""
    lora = saved(tmp_path / "style.safetensors", pair(Q))
    beside = tmp_path / "adapter_config.json"
    beside.write_text(json.dumps({"r": 16, "lora_alpha": 32}))
    assert "remove adapter_config.json from its folder if it is of another LoRA" in refused(wan, lora)
    beside.unlink()
    assert opened(wan, lora).updates[Q].scale == 1
    beside.write_text(json.dumps({"r": 16, "lora_alpha": 32}))
    own = saved(tmp_path / "adapter_model.safetensors", pair(Q, 16))
    assert opened(wan, own).updates[Q].scale == 2 and opened(wan, lora).updates[Q].scale == 1


def test_where_the_strength_comes_from_is_said(wan: Path, tmp_path: Path) -> None:
    lora = saved(tmp_path / "a.safetensors", pair(Q), config(r=4, lora_alpha=16))
    text = str(opened(wan, lora).report)
    want = "(scaled as its header's lora_adapter_metadata says: alpha 16, rank 4)"
    assert text == f"a.safetensors: 2 of 2 keys applied {want}"
    own = saved(tmp_path / "b.safetensors", {**pair(Q), f"{Q}.alpha": torch.tensor(2.0)}, config(r=4, lora_alpha=16))
    lora_with_own = opened(wan, own)  # the key is of this layer, the header of all
    assert lora_with_own.updates[Q].scale == 0.5 and "scaled as" not in str(lora_with_own.report)


def test_both_experts_in_one_file(wan: Path, tmp_path: Path) -> None:
    """Way out: the command that makes two files of it."""
    tensors = {**pair(f"transformer.{diffusers_name(Q)}"), **pair(f"transformer_2.{diffusers_name(Q)}")}
    lora = saved(tmp_path / "both.safetensors", tensors)
    text = refused(wan, lora)
    assert "holds the LoRAs of both experts of Wan 2.2" in text
    python, *arguments = shlex.split(text.partition("make two files of it: ")[2])
    assert python == "python"
    subprocess.run([sys.executable, *arguments], cwd=tmp_path, check=True)
    for name, component in (("high", "transformer"), ("low", "transformer_2")):
        part = opened(wan, tmp_path / f"{name}.safetensors")
        assert part.report.num_applied == part.report.num_keys == 2
        down = part.checkpoint.read(f"{component}.{diffusers_name(Q)}.lora_A.weight")
        assert torch.equal(down, tensors[f"{component}.{diffusers_name(Q)}.lora_A.weight"])


# Parts that are no update of a layer -> why.
BROKEN: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "half of a LoHa": (lambda: {"hada_w1_a": torch.zeros(DIM, 4)}, "half of a LoHa"),
    "LoHa of two sizes": (
        lambda: {
            **{f"hada_w1_{end}": torch.zeros(*shape) for end, shape in (("a", (DIM, 4)), ("b", (4, DIM)))},
            **{f"hada_w2_{end}": torch.zeros(*shape) for end, shape in (("a", (DIM, 4)), ("b", (4, FFN)))},
        },
        "its halves are",
    ),
    "LoHa of vectors": (
        lambda: {f"hada_w{n}_{end}": torch.zeros(DIM) for n in "12" for end in "ab"},
        "which cannot be multiplied",
    ),
    "half of a LoKr": (lambda: {"lokr_w1": torch.zeros(4, 4)}, "half of a LoKr"),
    "LoKr of another size": (
        lambda: {"lokr_w1": torch.zeros(4, 4), "lokr_w2": torch.zeros(8, 8)},
        "another size: 32 to 32 features, the model has 128 to 128",
    ),
    "OFT of another size": (lambda: {"oft_blocks": torch.zeros(2, 8, 8)}, "rotates 16 outputs, the model has 128"),
    "OFT of no squares": (lambda: {"oft_blocks": torch.zeros(16, 8, 4)}, "its rotations are [16, 8, 4]"),
    "GLoRA of another size": (
        lambda: {
            "a1.weight": torch.zeros(64, 4), "a2.weight": torch.zeros(4, 64),
            "b1.weight": torch.zeros(DIM, 4), "b2.weight": torch.zeros(4, DIM),
        },
        "64 to 64 features, the model has 128 inputs",
    ),
    "GLoRA that does not multiply": (
        lambda: {f"{part}.weight": torch.zeros(3 + n, 20 - n) for n, part in enumerate(("a1", "a2", "b1", "b2"))},
        "its factors cannot be multiplied",
    ),
    "a middle of another rank": (
        lambda: {
            "lora_down.weight": torch.zeros(4, DIM), "lora_up.weight": torch.zeros(DIM, 4),
            "lora_mid.weight": torch.zeros(3, 3),
        },
        "which cannot be multiplied",
    ),
    "a DoRA of rotations": (
        lambda: {"oft_blocks": torch.zeros(16, 8, 8), "dora_scale": torch.ones(DIM, 1)},
        "a DoRA of what is no low-rank pair",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_update_of_its_layer_is_left_out_and_said(kind: str, wan: Path, tmp_path: Path) -> None:
    parts, said = BROKEN[kind]
    odd = {f"diffusion_model.blocks.0.cross_attn.k.{end}": tensor for end, tensor in parts().items()}
    lora = save_lora(tmp_path / "lora.safetensors", make_factors(layers=[Q, f"{Q[:-1]}k"]), "ComfyUI", **odd)
    report = opened(wan, lora).report
    print(report)
    assert report.skipped.keys() == odd.keys() and (report.num_applied, report.num_keys) == (6, 6 + len(odd))
    assert all(said in reason for reason in report.skipped.values())
