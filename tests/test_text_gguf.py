"""UMT5 encoders from GGUF files in llama.cpp's layout, against the same encoder in the Hugging Face layout."""

import io
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
import torch
from lowvram_video.families.identify import describe, identify
from lowvram_video.wanvideo.text.checkpoint import load_text_encoder
from lowvram_video.wanvideo.text.encoder import UMT5Config, UMT5Encoder
from lowvram_video.wanvideo.text.gguf import BLOCK_NAMES, gguf_spiece
from lowvram_video.weights.files.checkpoint import CheckpointError
from lowvram_video.weights.files.open import open_checkpoint
from lowvram_video.weights.kernels.gguf_reference import BLOCK_TYPES, dequantize_reference
from lowvram_video.weights.linear.linear import Linear
from safetensors.torch import save_file
from torch import Tensor

from .quantizers import quantize, write_gguf

SENTENCES = [
    "a red ball moves left over green grass",
    "a blue square moves right in the morning light",
    "the camera slowly turns around an old lighthouse at night",
    "一个红色的球向左移动",
]
PROMPTS = [*SENTENCES, "", "Ｒｅｄ ﬁre", "A  ball\n moves\tleft ", "unseen: Ωmega €5 🚀", "色调艳丽，静态"]
CONFIG = UMT5Config(vocab_size=640, dim=256, attention_dim=256, ffn_dim=512, num_heads=4, num_layers=2)
PAD, END, UNKNOWN, UNUSED, CONTROL, NORMAL, BYTE = 0, 1, 2, 5, 3, 1, 6


@pytest.fixture(scope="module")
def spiece() -> bytes:
    """A tokenizer with umt5's special tokens and fallback to bytes, and sentencepiece's usual normalisation."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4), model_writer=written, vocab_size=400, hard_vocab_limit=False,
        pad_piece="<pad>", pad_id=0, eos_id=1, bos_id=2, unk_id=3, byte_fallback=True, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return written.getvalue()


def fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, payload) of a protobuf message's length-delimited fields."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position, value, shift = position + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while position < len(message):
        key = varint()
        size = {0: None, 5: 4, 1: 8}.get(key & 7) if key & 7 != 2 else varint()
        if size is None:
            varint()
            continue
        if key & 7 == 2:
            yield key >> 3, message[position : position + size]
        position += size


def tokenizer_fields(spiece: bytes, num_rows: int) -> dict[str, object]:
    """The metadata that llama.cpp's converter writes for a T5 tokenizer."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    num = processor.get_piece_size()
    kinds = [
        UNKNOWN if processor.is_unknown(n) else CONTROL if processor.is_control(n)
        else BYTE if processor.is_byte(n) else NORMAL
        for n in range(num)
    ]  # fmt: skip
    normalizer = dict(fields(spiece))[3]
    return {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [processor.id_to_piece(n) for n in range(num)]
        + [f"[PAD{n}]" for n in range(num, num_rows)],
        "tokenizer.ggml.scores": [processor.get_score(n) for n in range(num)] + [-10000.0] * (num_rows - num),
        "tokenizer.ggml.token_type": kinds + [UNUSED] * (num_rows - num),
        "tokenizer.ggml.precompiled_charsmap": list(dict(fields(normalizer))[2]),
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.remove_extra_whitespaces": True,
        "tokenizer.ggml.padding_token_id": PAD,
        "tokenizer.ggml.eos_token_id": END,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
    }


def encoder_weights() -> dict[str, Tensor]:
    model = UMT5Encoder(CONFIG)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    table = torch.empty(CONFIG.vocab_size, CONFIG.dim)
    for name, tensor in {"shared.weight": table, **model.state_dict()}.items():
        values = torch.randn(tensor.shape, generator=generator)
        weights[name] = 1 + 0.1 * values if tensor.ndim == 1 else 0.08 * values
    return weights


def llama_name(name: str) -> str:
    layer, _, suffix = name.rpartition(".")
    if layer in ("shared", "encoder.final_layer_norm"):
        return {"shared": "token_embd", "encoder.final_layer_norm": "enc.output_norm"}[layer] + f".{suffix}"
    _, _, number, inner = layer.split(".", 3)
    return f"enc.blk.{number}.{ {ours: theirs for theirs, ours in BLOCK_NAMES.items()}[inner] }.{suffix}"


def save_both(folder: Path, quant: str, spiece: bytes, tokens: bool = True) -> tuple[Path, Path]:
    """A GGUF with linear layers and table in one type, and a safetensors file of the values that it stands for."""
    linear = {f"{name}.weight" for name, module in UMT5Encoder(CONFIG).named_modules() if isinstance(module, Linear)}
    packed: dict[str, tuple[Tensor, str]] = {}
    dense: dict[str, Tensor] = {}
    for name, values in encoder_weights().items():
        if quant in BLOCK_TYPES and (name in linear or name == "shared.weight"):
            stored = quantize(values, quant)
            packed[llama_name(name)] = (stored, quant)
            dense[name] = dequantize_reference(stored, quant, values.shape)
        else:
            packed[llama_name(name)] = (
                values.half() if values.ndim > 1 else values,
                "F16" if values.ndim > 1 else "F32",
            )
            dense[name] = values.half().float() if values.ndim > 1 else values
    packed["dec.blk.0.attn_q.weight"] = (torch.zeros(2, 256), "F32")  # a whole T5 has a decoder too
    metadata = tokenizer_fields(spiece, CONFIG.vocab_size) if tokens else {}
    path = write_gguf(folder / "umt5.gguf", packed, "t5encoder", metadata)
    dense["spiece_model"] = torch.frombuffer(bytearray(spiece), dtype=torch.uint8)
    save_file(dense, folder / "umt5.safetensors")
    return path, folder / "umt5.safetensors"


@pytest.mark.parametrize("quant", ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "F16"])
def test_encodes_as_the_dense_model(tmp_path: Path, spiece: bytes, quant: str) -> None:
    packed, dense = (load_text_encoder(path) for path in save_both(tmp_path, quant, spiece))
    got, want = packed.encode(PROMPTS), dense.encode(PROMPTS)
    assert want.isfinite().all() and float(want.std()) > 0.1
    error = float((got - want).abs().max())
    print(f"{quant}: max difference {error:.1e}")
    assert torch.equal(got, want)


def test_the_tokenizer_in_the_metadata_is_the_original(tmp_path: Path, spiece: bytes) -> None:
    path, _ = save_both(tmp_path, "Q8_0", spiece)
    original = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    rebuilt = sentencepiece.SentencePieceProcessor(model_proto=gguf_spiece(path))
    assert rebuilt.get_piece_size() == original.get_piece_size()
    for name in ("pad_id", "eos_id", "bos_id", "unk_id"):
        assert getattr(rebuilt, name)() == getattr(original, name)(), name
    texts = [*PROMPTS, "\u3000wide\u00a0space ", "e\u0301 \u212b ½", "x" * 300]
    assert [rebuilt.encode(text) for text in texts] == [original.encode(text) for text in texts]
    print(f"{len(texts)} texts: identical ids")


def test_files_without_a_tokenizer_say_so(tmp_path: Path, spiece: bytes) -> None:
    path, _ = save_both(tmp_path, "Q8_0", spiece, tokens=False)
    assert gguf_spiece(path) is None
    with pytest.raises(CheckpointError, match=r"spiece\.model"):
        load_text_encoder(path)
    (tmp_path / "spiece.model").write_bytes(spiece)
    assert load_text_encoder(path).encode(["red"]).isfinite().all()


def test_another_kind_of_tokenizer_is_refused(tmp_path: Path, spiece: bytes) -> None:
    metadata = {**tokenizer_fields(spiece, 400), "tokenizer.ggml.model": "llama"}
    path = write_gguf(tmp_path / "other.gguf", {"a": (torch.zeros(2), "F32")}, "t5encoder", metadata)
    with pytest.raises(ValueError, match="'llama'; expected 't5'"):
        gguf_spiece(path)


def test_identification(tmp_path: Path, spiece: bytes) -> None:
    text = describe(identify(open_checkpoint(save_both(tmp_path, "Q6_K", spiece)[0])))
    print(text)
    for word in ("UMT5 text encoder", "width 256, 640 tokens, with its tokenizer", "Q6_K"):
        assert word in text


def test_a_full_vocabulary_opens_quickly(tmp_path: Path) -> None:
    num = 256_384
    metadata = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": ["<pad>", "</s>", "<s>", "<unk>", *(f"▁{n}" for n in range(4, num))],
        "tokenizer.ggml.scores": [-float(n) for n in range(num)],
        "tokenizer.ggml.token_type": [CONTROL, CONTROL, CONTROL, UNKNOWN, *[NORMAL] * (num - 4)],
    }
    path = write_gguf(tmp_path / "big.gguf", {"a": (torch.zeros(2), "F32")}, "t5encoder", metadata)
    start = time.process_time()
    open_checkpoint(path)
    opened = time.process_time()
    spiece = gguf_spiece(path)
    print(f"header {opened - start:.2f} s, tokenizer {time.process_time() - opened:.2f} s")
    assert opened - start < 3  # GGUFReader takes 8 s
    assert sentencepiece.SentencePieceProcessor(model_proto=spiece).get_piece_size() == num
