"""Models, tokenizers and LoRAs that somebody made to be read badly: each is refused in one line, soon."""

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lowvram_video.framepack.text.bpe import LLAMA_SPLIT, BytePairTokenizer
from lowvram_video.framepack.text.llama_gguf import gguf_tokenizer
from lowvram_video.wanvideo.checkpoint import open_wan
from lowvram_video.wanvideo.text.checkpoint import open_text_encoder
from lowvram_video.wanvideo.text.gguf import gguf_spiece
from lowvram_video.wanvideo.vae.checkpoint import WAN_FORMAT
from lowvram_video.weights.files.checkpoint import CheckpointError
from lowvram_video.weights.files.open import open_checkpoint
from lowvram_video.weights.lora.scaling import read_scaling
from safetensors.torch import load_file, save_file

from .quantizers import write_gguf
from .refusals import MOST_SECONDS, refusal
from .tiny import save_text_encoder, save_vae, save_wan

# --- dimensions ----------------------------------------------------------------------------------------------


def with_tensor(path: Path, name: str, tensor: torch.Tensor) -> Path:
    save_file(load_file(path) | {name: tensor}, path)
    return path


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("head.head.weight", (0, 128)),
        ("head.head.weight", (1, 128)),
        ("patch_embedding.weight", (128, 16, 0, 2, 2)),
        ("patch_embedding.weight", (0, 16, 1, 2, 2)),
        ("blocks.0.ffn.0.weight", (0, 128)),
        ("text_embedding.0.weight", (128, 0)),
        ("blocks.77777777.ffn.0.weight", (1,)),
        ("blocks." + "9" * 5000 + ".ffn.0.weight", (1,)),
        ("blocks.٣.ffn.0.weight", (1,)),
    ],
)
def test_sizes_of_a_wan_model(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    path = with_tensor(save_wan(tmp_path / "wan.safetensors"), name, torch.zeros(shape))
    if "٣" in name:  # a layer of another model's: it is left alone
        return open_wan(path) and None
    return refusal(lambda: open_wan(path)) and None


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 0)),
        ("encoder.block.77777777.layer.0.layer_norm.weight", (1,)),
        ("encoder.block." + "9" * 5000 + ".x", (1,)),
        ("shared.weight", (0, 64)),
    ],
)
def test_sizes_of_a_text_encoder(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    path = with_tensor(save_text_encoder(tmp_path / "umt5.safetensors"), name, torch.zeros(shape))
    refusal(lambda: open_text_encoder(path))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("encoder.conv1.weight", (0, 3, 3, 3, 3)),
        ("conv2.weight", (16, 0, 1, 1, 1)),
        ("decoder.conv1.weight", (0, 16, 3, 3, 3)),
        ("encoder.downsamples.99999999.residual.2.weight", (1, 1, 1, 1, 1)),
        ("encoder.downsamples." + "9" * 5000 + ".residual.2.weight", (1, 1, 1, 1, 1)),
    ],
)
def test_sizes_of_a_vae(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    path = with_tensor(save_vae(tmp_path / "vae.safetensors"), name, torch.zeros(shape))
    try:
        WAN_FORMAT.open_file(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert "99" in name  # no part of the VAE


def test_numbers_that_a_header_states(tmp_path: Path) -> None:
    path = save_wan(tmp_path / "wan.safetensors")
    for stated in ("9" * 5000, "0", "-2", "٣", "1e400", ""):
        save_file(load_file(path), path, {"lowvram_video.num_heads": stated})
        refusal(lambda: open_wan(path))


def in_bytes(text: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


@pytest.mark.parametrize(
    "content",
    [
        torch.zeros(4),
        torch.zeros(1 << 20, dtype=torch.uint8),
        in_bytes(b"[" * 2000),
        in_bytes(b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 1e400}'),
        in_bytes(b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 1e37}'),
    ],
)
def test_markers_of_quantised_layers(tmp_path: Path, content: torch.Tensor) -> None:
    path = with_tensor(save_wan(tmp_path / "wan.safetensors"), "blocks.0.ffn.0.comfy_quant", content)
    refusal(lambda: open_wan(path))


# --- tokenizers ----------------------------------------------------------------------------------------------

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SPLIT = {"type": "Split", "pattern": {"Regex": LLAMA_SPLIT}, "behavior": "Isolated", "invert": False}
GOOD: dict[str, Any] = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
    "added_tokens": [{"id": 3, "content": "<x>"}],
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, BYTE_LEVEL]},
    "normalizer": None,
}


def tokenizer(**swap: Any) -> BytePairTokenizer:
    parts = copy.deepcopy(GOOD) | swap
    return BytePairTokenizer(parts["model"], parts["added_tokens"], parts["pre_tokenizer"], parts["normalizer"])


def model(**swap: Any) -> dict[str, Any]:
    return {"model": copy.deepcopy(GOOD["model"]) | swap}


BAD_PARTS = {
    "a pattern that explodes": {"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "(a+)+$"}}},
    "a vocabulary that is a list": model(vocab=[["a", 0]]),
    "a number of text": model(vocab={"a": "x", "b": 1, "ab": 2}),
    "a number below 0": model(vocab={"a": -5, "b": 1, "ab": 2}),
    "a number of 2^62": model(vocab={"a": 2**62, "b": 1, "ab": 2}),
    "a number that is true": model(vocab={"a": True, "b": 1, "ab": 2}),
    "a number that is an object": model(vocab={"a": {}, "b": 1, "ab": 2}),
    "merges that are an object": model(merges={"a": "b"}),
    "merges of nothing": model(merges=[None]),
    "merges of three": model(merges=[["a", "b", "c"]]),
    "a merge of one": model(merges=["a"]),
    "an unknown token that is an object": model(unk_token={"a": 1}),
    "an added token without a text": {"added_tokens": [{"id": 3, "content": 5}]},
    "an added token without a number": {"added_tokens": [{"id": "3", "content": "<x>"}]},
    "thirty passes over bytes": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, *[BYTE_LEVEL] * 30]}},
    "a space that becomes ten million": {
        "normalizer": {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": "x" * 10**7}
    },
    "a hundred normalizers": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKD"}] * 100}},
}


@pytest.mark.parametrize("title", BAD_PARTS)
def test_parts_of_tokenizers(title: str) -> None:
    refusal(lambda: tokenizer(**BAD_PARTS[title]), ValueError)


def test_a_good_tokenizer_takes_long_texts() -> None:
    good = tokenizer()
    assert good.encode("ab") == [2]
    began = time.monotonic()
    for text in ("a" * 200_000, " " * 200_000, "\n " * 100_000, "a " * 100_000 + "!"):
        good.encode(text)
    assert time.monotonic() - began < MOST_SECONDS


def llama_fields(**swap: Any) -> dict[str, Any]:
    fields = {
        "model": "gpt2",
        "pre": "llama-bpe",
        "tokens": ["a", "b", "ab"],
        "token_type": [1, 1, 1],
        "merges": ["a b"],
    }
    return {f"tokenizer.ggml.{name}": value for name, value in (fields | swap).items()}


@pytest.mark.parametrize(
    "swap",
    [{"tokens": 5}, {"tokens": "abc"}, {"tokens": [1, 2, 3]}, {"token_type": 5}, {"token_type": [1]},
     {"merges": [1, 2]}, {"merges": "a b"}, {"model": 7}, {"pre": [1, 2]}],
)  # fmt: skip
def test_vocabularies_of_llama_gguf_files(tmp_path: Path, swap: dict[str, Any]) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"a": (torch.ones(32), "F32")}, fields=llama_fields(**swap))
    refusal(lambda: gguf_tokenizer(path))


@pytest.mark.parametrize(
    "swap",
    [{"tokens": [1, 2]}, {"scores": ["a", "b"]}, {"scores": [float("nan"), 0.0]}, {"token_type": [0.5, 1.5]},
     {"token_type": [-1, -1]}, {"precompiled_charsmap": "text"}, {"precompiled_charsmap": [0.5]}, {"model": "x"}],
)  # fmt: skip
def test_vocabularies_of_umt5_gguf_files(tmp_path: Path, swap: dict[str, Any]) -> None:
    fields = {"model": "t5", "tokens": ["a", "b"], "scores": [0.0, -1.0], "token_type": [1, 1]} | swap
    named = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    path = write_gguf(tmp_path / "m.gguf", {"a": (torch.ones(32), "F32")}, fields=named)
    refusal(lambda: gguf_spiece(path), ValueError)


# --- LoRAs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(.*a){20}", ".*.*.*.*x", "a?" * 40 + "a" * 40, "(a|aa)+", "(?=a)", "x" * 300]
)
def test_patterns_of_layers_do_not_explode(tmp_path: Path, pattern: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "l.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "alpha_pattern": {pattern: 1}}))
    assert "no pattern of layers" in refusal(lambda: read_scaling(open_checkpoint(tmp_path / "l.safetensors")))


@pytest.mark.parametrize(
    ("pattern", "module"),
    [("to_q", "blocks.0.to_q"), (r"blocks\.0\.to_q", "blocks.0.to_q"), (r".*\.to_(q|k)", "a.b.to_k"),
     ("^a.to_q$", "a.to_q"), (r"blocks\.[0-9]+\.to_q", "blocks.12.to_q"), (r"blocks\.\d+\..*q", "blocks.1.to_q"),
     ("x[0-3].to_q", "x2.to_q")],
)  # fmt: skip
def test_patterns_that_peft_writes_are_read(tmp_path: Path, pattern: str, module: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "l.safetensors")
    config = {"r": 4, "lora_alpha": 4, "alpha_pattern": {pattern: 12}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    scaling = read_scaling(open_checkpoint(tmp_path / "l.safetensors"))
    assert scaling is not None and scaling.scale(module, 4) == 3.0 and scaling.scale("other", 4) == 1.0


def test_a_configuration_that_is_no_json(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "l.safetensors")
    for text in ("[" * 100_000, "[]", '{"r": 1e400}', '{"lora_alpha": 1' + "0" * 400 + "}"):
        (tmp_path / "adapter_config.json").write_text(text)
        refusal(lambda: read_scaling(open_checkpoint(tmp_path / "l.safetensors")))
