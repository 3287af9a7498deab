"""The GGUF loader's CLIP against core's own from the same weights in the Hugging Face layout, both of a tiny size."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import comfy.sd
import comfy.text_encoders.t5
import folder_paths
import gguf
import pytest
import sentencepiece
import torch
from lowvram_pack.nodes.text import LoadClipGGUF
from lowvram_pack.wanvideo.text_encoder import UMT5Config, UMT5Encoder
from lowvram_pack.wanvideo.text_gguf import BLOCK_NAMES, TOP_NAMES
from safetensors.torch import save_file
from tiny_models import relative_error
from torch import Tensor

import nodes

CONFIG = UMT5Config(vocab_size=320, dim=128, attention_dim=128, ffn_dim=256, num_heads=2, num_layers=2)
SENTENCES = ["a red ball moves left over green grass", "the camera turns around an old lighthouse at night"]
CORE_SIZES = {"vocab_size": 320, "d_model": 128, "d_kv": 64, "d_ff": 256, "num_heads": 2, "num_layers": 2}
Q8_0 = gguf.GGMLQuantizationType.Q8_0


@pytest.fixture(scope="module")
def spiece() -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4), model_writer=written, vocab_size=300, hard_vocab_limit=False,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, byte_fallback=True, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return written.getvalue()


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, tensor in UMT5Encoder(CONFIG).state_dict().items():
        values = torch.randn(tensor.shape, generator=generator)
        found[name] = (1 + 0.1 * values if tensor.ndim == 1 else 0.08 * values).half()
    return found


def llama_name(name: str) -> str:
    layer, _, suffix = name.rpartition(".")
    for theirs, ours in TOP_NAMES.items():
        if layer == ours:
            return f"{theirs}.{suffix}"
    _, _, number, inner = layer.split(".", 3)
    return f"enc.blk.{number}.{next(theirs for theirs, ours in BLOCK_NAMES.items() if ours == inner)}.{suffix}"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, spiece: bytes) -> Iterator[Path]:
    """tiny.gguf and tiny.safetensors: the same numbers, Q8_0's rounding included."""
    folder = tmp_path_factory.mktemp("text_encoders")
    folder_paths.add_model_folder_path("text_encoders", str(folder))
    processor = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    num = processor.get_piece_size()
    kinds = [
        2 if processor.is_unknown(n) else 3 if processor.is_control(n) else 6 if processor.is_byte(n) else 1
        for n in range(num)
    ]
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "t5encoder")
    writer.add_tokenizer_model("t5")
    writer.add_token_list([processor.id_to_piece(n) for n in range(num)])
    writer.add_token_scores([processor.get_score(n) for n in range(num)])
    writer.add_token_types(kinds)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(3)
    dense = {"spiece_model": torch.frombuffer(bytearray(spiece), dtype=torch.uint8)}
    for name, tensor in weights().items():
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            packed = gguf.quants.quantize(tensor.float().numpy(), Q8_0)
            writer.add_tensor(llama_name(name), packed, raw_dtype=Q8_0)
            dense[name] = torch.from_numpy(gguf.quants.dequantize(packed, Q8_0).copy()).half()
        else:
            writer.add_tensor(llama_name(name), tensor.float().numpy())
            dense[name] = tensor
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(dense, folder / "tiny.safetensors")
    yield folder


def test_the_clip_is_cores_own(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # core tells encoders apart by sizes, and knows none this small
    monkeypatch.setattr(comfy.sd, "detect_te_model", lambda _: comfy.sd.TEModel.T5_XXL)
    clip = LoadClipGGUF.execute("tiny.gguf", "default").result[0]
    wanted = comfy.sd.load_clip(
        [str(files / "tiny.safetensors")], clip_type=comfy.sd.CLIPType.WAN,
        model_options={"umt5xxl_model_config": CORE_SIZES},
    )  # fmt: skip
    for text in (*SENTENCES, "a red lighthouse, (very:1.2) old"):
        got, reference = (nodes.CLIPTextEncode().encode(each, text)[0][0][0] for each in (clip, wanted))
        assert got.shape == reference.shape == (1, 512, 128)
        assert relative_error(got, reference) < 1e-3
    print(f"CLIP from GGUF: relative error {relative_error(got, reference):.2e}")
    assert got.abs().max() > 0.1


def test_keys_and_shapes_are_those_that_core_expects(files: Path) -> None:
    from lowvram_pack.wanvideo.text_checkpoint import dense_weights

    config, found = dense_weights(files / "tiny.gguf", torch.float16)
    assert config == CONFIG
    sizes = {"dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True, "model_type": "umt5", **CORE_SIZES}
    model = comfy.text_encoders.t5.T5(sizes, torch.float16, "meta", torch.nn)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found.pop("spiece_model")
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == wanted
    assert all(tensor.dtype == torch.float16 for tensor in found.values())


def test_other_files_are_refused_in_one_line(files: Path) -> None:
    writer = gguf.GGUFWriter(files / "other.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", torch.zeros(32, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name in ("other.gguf", "gone.gguf"):
        with pytest.raises(ValueError) as error:
            LoadClipGGUF.execute(name, "default")
        assert name in str(error.value)
        assert "\n" not in str(error.value)
