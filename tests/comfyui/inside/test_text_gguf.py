"""The GGUF loader's CLIP against core's own from the same weights in the Hugging Face layout, both of a tiny size."""

from __future__ import annotations

import io
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import comfy.model_management as mm
import comfy.sd
import folder_paths
import gguf
import pytest
import sentencepiece
import torch
from lowvram_pack.nodes.text_encoder import LoadClipGGUF
from lowvram_pack.wanvideo.text.encoder import GatedFeedForward, UMT5Config, UMT5Encoder
from lowvram_pack.wanvideo.text.gguf import BLOCK_NAMES, TOP_NAMES
from lowvram_pack.weights.files.checkpoint import Checkpoint
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


def weights(config: UMT5Config) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    table = torch.empty(config.vocab_size, config.dim)
    for name, tensor in {"shared.weight": table, **UMT5Encoder(config).state_dict()}.items():
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
    """tiny.gguf and tiny.safetensors: the same numbers, Q8_0's rounding included; deep.gguf: 12 blocks."""
    folder = tmp_path_factory.mktemp("text_encoders")
    folder_paths.add_model_folder_path("text_encoders", str(folder))
    write_gguf(folder / "deep.gguf", spiece, replace(CONFIG, num_layers=12))
    dense = write_gguf(folder / "tiny.gguf", spiece, CONFIG)
    dense["spiece_model"] = torch.frombuffer(bytearray(spiece), dtype=torch.uint8)
    save_file(dense, folder / "tiny.safetensors")
    yield folder


def write_gguf(path: Path, spiece: bytes, config: UMT5Config) -> dict[str, Tensor]:
    """Write an encoder with its tokenizer; returns the numbers that it stands for."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    num = processor.get_piece_size()
    kinds = [
        2 if processor.is_unknown(n) else 3 if processor.is_control(n) else 6 if processor.is_byte(n) else 1
        for n in range(num)
    ]
    writer = gguf.GGUFWriter(path, "t5encoder")
    writer.add_tokenizer_model("t5")
    writer.add_token_list([processor.id_to_piece(n) for n in range(num)])
    writer.add_token_scores([processor.get_score(n) for n in range(num)])
    writer.add_token_types(kinds)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(3)
    dense: dict[str, Tensor] = {}
    for name, tensor in weights(config).items():
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            packed = gguf.quants.quantize(tensor.float().numpy(), Q8_0)
            writer.add_tensor(llama_name(name), packed, raw_dtype=Q8_0)
            dense[name] = torch.from_numpy(gguf.quants.dequantize(packed, Q8_0).copy())  # in fp32: exact
        else:
            writer.add_tensor(llama_name(name), tensor.float().numpy())
            dense[name] = tensor.float()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dense


@pytest.mark.parametrize("name", ["tiny.gguf", "tiny.safetensors"])
def test_the_clip_is_cores_own(files: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # core tells encoders apart by sizes, and knows none this small
    monkeypatch.setattr(comfy.sd, "detect_te_model", lambda _: comfy.sd.TEModel.T5_XXL)
    clip = LoadClipGGUF.execute(name, "default").result[0]
    wanted = comfy.sd.load_clip(
        [str(files / "tiny.safetensors")], clip_type=comfy.sd.CLIPType.WAN,
        model_options={"umt5xxl_model_config": CORE_SIZES, "dtype": torch.float32},
    )  # fmt: skip
    for text in (*SENTENCES, "a red lighthouse, (very:1.2) old"):
        got, reference = (nodes.CLIPTextEncode().encode(each, text)[0][0][0] for each in (clip, wanted))
        assert got.shape == reference.shape == (1, 512, 128)
        assert relative_error(got, reference) < 1e-4
    print(f"CLIP from {name}: relative error {relative_error(got, reference):.2e}")
    assert got.abs().max() > 0.1
    got, reference = (
        nodes.CLIPTextEncode().encode(nodes.CLIPSetLastLayer().set_last_layer(each, -2)[0], SENTENCES[0])[0][0][0]
        for each in (clip, wanted)
    )
    assert relative_error(got, reference) < 1e-4


def test_blocks_are_in_ram_as_stored_and_one_at_a_time(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Allocated for weights at once: two blocks as Q8_0 stores them, not the model unpacked."""
    sizes: weakref.WeakKeyDictionary[Tensor, int] = weakref.WeakKeyDictionary()
    peak, read = 0, Checkpoint.read

    def counting(self: Checkpoint, name: str) -> Tensor:
        nonlocal peak
        tensor = read(self, name)
        sizes[tensor] = tensor.nbytes
        peak = max(peak, sum(sizes.values()))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", counting)
    clip = LoadClipGGUF.execute("deep.gguf", "cpu").result[0]
    loaded = peak
    nodes.CLIPTextEncode().encode(clip, SENTENCES[0])
    stored = (files / "deep.gguf").stat().st_size
    print(f"{stored} bytes of file, at most {peak} of weights in RAM at once, {loaded} before the first prompt")
    assert loaded < stored / 100
    assert peak < stored / 3
    assert sum(parameter.nbytes for parameter in clip.cond_stage_model.parameters()) < 100  # nothing for core to load
    again = nodes.CLIPTextEncode().encode(clip, SENTENCES[0])[0][0][0]
    assert torch.equal(again, nodes.CLIPTextEncode().encode(clip.clone(), SENTENCES[0])[0][0][0])


def test_an_interrupt_stops_between_blocks(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = LoadClipGGUF.execute("tiny.gguf", "cpu").result[0]
    mm.interrupt_current_processing(True)
    with pytest.raises(mm.InterruptProcessingException):
        nodes.CLIPTextEncode().encode(clip, SENTENCES[0])
    mm.interrupt_current_processing(False)
    assert nodes.CLIPTextEncode().encode(clip, SENTENCES[0])[0][0][0].isfinite().all()


def test_a_prompt_is_encoded_again_where_memory_was_lacking(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = LoadClipGGUF.execute("tiny.gguf", "cpu").result[0]
    expected = nodes.CLIPTextEncode().encode(clip, SENTENCES[0])[0][0][0]
    errors, forward = [torch.cuda.OutOfMemoryError("CUDA out of memory.")], GatedFeedForward.forward

    def scarce(self: GatedFeedForward, x: Tensor) -> Tensor:
        if errors:
            raise errors.pop()
        return forward(self, x)

    monkeypatch.setattr(GatedFeedForward, "forward", scarce)
    assert torch.equal(nodes.CLIPTextEncode().encode(clip, SENTENCES[0])[0][0][0], expected)


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
