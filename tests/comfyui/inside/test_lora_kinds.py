"""Decompositions as we merge them against ComfyUI's own adapters, of the same file."""

from __future__ import annotations

from pathlib import Path

import comfy.lora
import pytest
import torch
from lowvram_pack.weights.files.checkpoint import TensorInfo
from lowvram_pack.weights.lora.file import open_lora
from safetensors.torch import save_file
from torch import Tensor

ROWS, COLUMNS, RANK = 32, 48, 4
ALPHA = {"alpha": torch.tensor(2.0)}


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + len(shape))) * 0.2


PAIR = {"lora_down.weight": rand(RANK, COLUMNS), "lora_up.weight": rand(ROWS, RANK)}
KINDS: dict[str, dict[str, Tensor]] = {
    "LoRA": {**PAIR, **ALPHA},
    "LoRA without alpha": PAIR,
    "DoRA by input": {**PAIR, **ALPHA, "dora_scale": 1 + rand(1, COLUMNS).abs()},
    "LoHa": {
        "hada_w1_a": rand(ROWS, RANK),
        "hada_w1_b": rand(RANK, COLUMNS),
        "hada_w2_a": rand(ROWS, RANK),
        "hada_w2_b": rand(RANK, COLUMNS),
        **ALPHA,
    },
    "LoKr, whole": {"lokr_w1": rand(4, 4), "lokr_w2": rand(8, 12), **ALPHA},
    "LoKr, second decomposed": {"lokr_w1": rand(4, 4), "lokr_w2_a": rand(8, 2), "lokr_w2_b": rand(2, 12), **ALPHA},
    "LoKr, both decomposed": {
        "lokr_w1_a": rand(4, 2),
        "lokr_w1_b": rand(2, 4),
        "lokr_w2_a": rand(8, 3),
        "lokr_w2_b": rand(3, 12),
        **ALPHA,
    },
    "GLoRA": {
        "a1.weight": rand(COLUMNS, RANK),
        "a2.weight": rand(RANK, COLUMNS),
        "b1.weight": rand(ROWS, RANK),
        "b2.weight": rand(RANK, COLUMNS),
        **ALPHA,
    },
    "GLoRA, old": {
        "a1.weight": rand(RANK, COLUMNS),
        "a2.weight": rand(COLUMNS, RANK),
        "b1.weight": rand(RANK, COLUMNS),
        "b2.weight": rand(ROWS, RANK),
        **ALPHA,
    },
    "OFT": {"oft_blocks": rand(4, 8, 8), "alpha": torch.tensor(0.0)},
    "OFT, constrained": {"oft_blocks": rand(4, 8, 8), "alpha": torch.tensor(0.5)},
    "BOFT": {"oft_blocks": rand(2, 4, 8, 8), "alpha": torch.tensor(0.0)},
    "difference": {"diff": rand(ROWS, COLUMNS)},
    "norm": {"w_norm": rand(ROWS, COLUMNS)},
    "in place": {"set_weight": 2 * rand(ROWS, COLUMNS)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_merged_as_core_merges_it(kind: str, tmp_path: Path) -> None:
    tensors = {f"layer.{end}": tensor for end, tensor in KINDS[kind].items()}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "lora.safetensors")
    weight = rand(ROWS, COLUMNS)
    info = TensorInfo("layer.weight", torch.float32, (ROWS, COLUMNS), tmp_path / "model.safetensors", 0, 0)
    lora = open_lora(tmp_path / "lora.safetensors", {info.name: info}, {"layer": "layer"})
    assert lora.report.num_applied == lora.report.num_keys == len(tensors)
    got = weight.clone()
    for change in (*lora.updates.values(), *lora.changes.values()):
        change.merge_(got, lora.checkpoint.read, 1.0)
    (patch,) = comfy.lora.load_lora(tensors, {"layer": info.name}).values()
    want = comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], weight.clone(), info.name)
    error = float((got - want).norm() / want.norm())
    print(f"{kind}: relative error {error:.1e} to core's; effect {float((want - weight).norm() / weight.norm()):.1e}")
    assert error < 1e-5 < float((want - weight).norm())
