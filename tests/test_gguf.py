"""GGUF files and their packed types, against the `gguf` package; models loaded from them against dense ones."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from lowvram_video.families.identify import describe, identify
from lowvram_video.memory.stream.layout import bind, layout_block
from lowvram_video.wanvideo.checkpoint import build_wan, open_wan
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.network.model import WanModel
from lowvram_video.weights.files.checkpoint import CheckpointError, TensorInfo
from lowvram_video.weights.files.open import open_checkpoint
from lowvram_video.weights.kernels.gguf_op import dequantize_in_chunks, dequantize_packed
from lowvram_video.weights.kernels.gguf_reference import BLOCK_TYPES, dequantize_reference, random_blocks
from lowvram_video.weights.linear.fitting import fit_tensors
from lowvram_video.weights.linear.formats import assign_formats, format_for
from lowvram_video.weights.linear.gguf import GGUF_FORMATS
from lowvram_video.weights.linear.linear import Linear
from lowvram_video.weights.linear.projection import Scratch
from lowvram_video.weights.linear.weight_format import PLAIN
from torch import Tensor

from .quantizers import quantize, write_gguf
from .tiny import load_wan

TYPES = sorted(BLOCK_TYPES)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def theirs(packed: Tensor, quant: str) -> np.ndarray:
    """What the `gguf` package makes of packed bytes."""
    return gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType[quant])


def same_bits(got: Tensor, want: np.ndarray) -> bool:
    return bool((got.numpy().view(np.uint32) == want.view(np.uint32)).all())


# --- types -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", TYPES)
def test_reference_equals_the_gguf_package_bit_for_bit(quant: str) -> None:
    block = BLOCK_TYPES[quant]
    sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[quant]]
    assert sizes == (block.elements, block.nbytes)
    packed = random_blocks(quant, 4096, torch.Generator().manual_seed(1)).view(128, -1)
    shape = (128, 32 * block.elements)
    got = dequantize_reference(packed, quant, shape)
    assert got.shape == shape
    assert same_bits(got, theirs(packed, quant))
    print(f"{quant}: {got.numel()} elements of random blocks, all bits equal")


# What rounding to a type costs on normally distributed weights: plain scales, without llama.cpp's search.
ERRORS = {
    "Q8_0": 0.006, "Q6_K": 0.02, "Q5_K": 0.04, "Q5_1": 0.04, "Q5_0": 0.045, "Q4_K": 0.08, "Q4_1": 0.08, "Q4_0": 0.09,
    "IQ4_NL": 0.085, "IQ4_XS": 0.085, "Q3_K": 0.16, "Q2_K": 0.34,
}  # fmt: skip


@pytest.mark.parametrize("quant", TYPES)
def test_quantised_weights_come_back(quant: str) -> None:
    weight = rand(32, 1024)
    weight[0] = 0  # a scale of zero
    packed = quantize(weight, quant)
    got = dequantize_reference(packed, quant, weight.shape)
    assert same_bits(got, theirs(packed, quant))
    error = float((got - weight).norm() / weight.norm())
    print(f"{quant}: {packed.numel() * 8 / weight.numel():.2f} bits per weight, relative error {error:.2e}")
    assert error < ERRORS[quant]
    assert torch.equal(got[0], weight[0])


@pytest.mark.parametrize("quant", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_operator_rounds_the_reference_once(quant: str, dtype: torch.dtype) -> None:
    block = BLOCK_TYPES[quant]
    packed = random_blocks(quant, 90, torch.Generator().manual_seed(2))
    want = dequantize_reference(packed, quant, (90, block.elements)).to(dtype)
    out = torch.empty_like(want)
    with torch.inference_mode():
        dequantize_packed(packed, out, quant)
    assert torch.equal(out, want)


def test_reference_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowvram_video.weights.kernels.gguf_op.CHUNK_ELEMENTS", 700)
    packed = random_blocks("Q5_K", 13, torch.Generator().manual_seed(3))
    out = torch.empty(13, 256)
    dequantize_in_chunks(packed, out, "Q5_K")
    assert torch.equal(out, dequantize_reference(packed, "Q5_K", (13, 256)))


@pytest.mark.parametrize(
    ("packed", "out", "words"),
    [
        (torch.zeros(143, dtype=torch.uint8), torch.empty(256), "do not fill"),
        (torch.zeros(144, dtype=torch.uint8), torch.empty(2, 256), "do not fill"),
        (torch.zeros(144), torch.empty(256), "expected uint8"),
        (torch.zeros(144, dtype=torch.uint8), torch.empty(256, dtype=torch.int32), "expected uint8"),
        (torch.zeros(2, 144, dtype=torch.uint8), torch.empty(256, 2).t(), "contiguous"),
    ],
)
def test_operator_refuses_what_does_not_fit(packed: Tensor, out: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dequantize_packed(packed, out, "Q4_K")


def test_operator_is_one_that_torch_compile_knows() -> None:
    packed = random_blocks("Q4_K", 4, torch.Generator().manual_seed(4))
    torch.library.opcheck(dequantize_packed, (packed, torch.empty(4, 256), "Q4_K"))


# --- files -----------------------------------------------------------------------------------------------


@pytest.fixture
def every_type(tmp_path: Path) -> Path:
    """A file with a tensor of every type and some metadata."""
    tensors = {f"{quant}.weight": (rand(6, 512, seed=n), quant) for n, quant in enumerate(TYPES)}
    tensors |= {
        "f32": (rand(5), "F32"),
        "f16": (rand(3, 7), "F16"),
        "bf16": (rand(3, 8), "BF16"),
        "five": (rand(4, 3, 1, 2, 2), "F32"),
        "flat": (rand(6, 256), "Q4_K"),
        "flat f16": (rand(2, 256), "F16"),
    }
    fields = {
        "comfy.gguf.orig_shape.flat": [2, 3, 256],
        "comfy.gguf.orig_shape.flat f16": [64, 2, 1, 2, 2],
        "lowvram_video.num_heads": 4,
        "general.name": "größe",
        "general.flag": True,
        "general.long": [f"item {n}" for n in range(100)],
        "general.numbers": list(range(100)),
    }
    return write_gguf(tmp_path / "every.gguf", tensors, fields=fields)


def test_files_read_as_the_gguf_package_reads_them(every_type: Path) -> None:
    checkpoint = open_checkpoint(every_type)
    reader = gguf.GGUFReader(every_type)
    assert [tensor.name for tensor in reader.tensors] == list(checkpoint.tensors)
    for tensor in reader.tensors:
        info = checkpoint.tensors[tensor.name]
        assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes), tensor.name
        values = checkpoint.read(tensor.name)
        assert values.shape == info.shape and values.dtype == info.dtype
        assert values.view(torch.uint8).numpy().tobytes() == tensor.data.tobytes()
        if info.quant is not None:
            assert info.dtype == torch.uint8 and info.quant == tensor.tensor_type.name
            unpacked = dequantize_reference(values, info.quant, info.logical_shape)
            assert same_bits(unpacked.flatten(), theirs(torch.from_numpy(tensor.data.copy()), info.quant).ravel())
    shapes = {name: (info.shape, info.logical_shape) for name, info in checkpoint.tensors.items()}
    assert shapes["Q4_K.weight"] == ((6, 288), (6, 512))
    assert shapes["five"] == ((4, 3, 1, 2, 2), None)
    assert shapes["flat"] == ((2, 3, 144), (2, 3, 256))
    assert shapes["flat f16"] == ((64, 2, 1, 2, 2), None)
    assert checkpoint.tensors["bf16"].dtype == torch.bfloat16
    assert torch.equal(checkpoint.read("bf16"), rand(3, 8).bfloat16())
    assert torch.equal(checkpoint.read("five"), rand(4, 3, 1, 2, 2))
    given = dict(checkpoint.metadata)
    assert given["general.architecture"] == "wan" and given["general.name"] == "größe"
    assert given["lowvram_video.num_heads"] == "4" and given["general.flag"] == "True"
    assert "general.long" not in given and "comfy.gguf.orig_shape.flat" not in given


def refused(path: Path, *words: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    print(message)
    assert "\n" not in message and path.name in message
    for word in ("expected", *words):
        assert word in message, word
    return message


def test_cut_files_are_refused(every_type: Path) -> None:
    whole = every_type.read_bytes()
    start = min(info.offset for info in open_checkpoint(every_type).tensors.values())
    cut = every_type.with_name("cut.gguf")
    for length in [4, 8, 23, 24, 100, *range(200, start, 137), start - 40]:
        cut.write_bytes(whole[:length])
        refused(cut, "truncated GGUF", "download it again")
    cut.write_bytes(whole[: start + 1000])
    refused(cut, "truncated GGUF", "by its header")


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"anything else", ("not a GGUF file",)),
        (b"", ("not a GGUF file", "0 bytes")),
        (b"<html>", ("a web page",)),
        (b"version https://git-lfs.github.com", ("git-lfs pointer",)),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), ("version 1", "version 2 or 3")),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), ("big-endian",)),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"k", 77), ("unknown type 77",)),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 9, 1), ("unknown type 9",)),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 8, 1 << 60), ("truncated",)),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 50, 0), ("truncated",)),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q1sI", 1, b"t", 99), ("99 dimensions",)),
    ],
)
def test_other_files_are_refused(tmp_path: Path, start: bytes, words: tuple[str, ...]) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(start)
    refused(path, *words)


@pytest.mark.parametrize(("number", "name"), [(19, "IQ1_S"), (34, "TQ1_0"), (10_000, "type number 10000")])
def test_types_that_are_not_known_are_named(tmp_path: Path, number: int, name: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", {"blocks.0.ffn.0.weight": (rand(2, 256), "Q4_K")})
    raw = path.read_bytes()
    at = raw.index(b"blocks.0.ffn.0.weight") + len("blocks.0.ffn.0.weight") + 4 + 2 * 8
    path.write_bytes(raw[:at] + struct.pack("<I", number) + raw[at + 4 :])
    refused(path, name, "blocks.0.ffn.0.weight", "Q4_K_M")


def test_contradictory_files_are_refused(tmp_path: Path) -> None:
    one = {"a.weight": (rand(2, 256), "Q4_K")}
    refused(write_gguf(tmp_path / "split.gguf", one, fields={"split.count": 3}), "one of 3 parts", "--merge")
    flat = {"comfy.gguf.orig_shape.a.weight": [3, 256]}
    refused(write_gguf(tmp_path / "shape.gguf", one, fields=flat), "[3, 256]")
    refused(write_gguf(tmp_path / "align.gguf", one, fields={"general.alignment": "x"}), "alignment")


def test_rows_may_be_packed_by_256_columns(tmp_path: Path) -> None:
    """As city96's converter does with rows that are no multiple of a block: unpacked as they are read."""
    values = rand(2, 256)
    narrow = {"comfy.gguf.orig_shape.weight": [4, 128]}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "narrow.gguf", {"weight": (values, "Q4_K")}, fields=narrow))
    info = checkpoint.tensors["weight"]
    assert (info.shape, info.logical_shape) == ((2, 144), (4, 128))
    want = dequantize_reference(quantize(values, "Q4_K"), "Q4_K", (2, 256)).view(4, 128)
    fitted = fit_tensors(Linear(128, 4, bias=False, device="meta"), checkpoint)
    assert torch.equal(fitted.read("weight"), want)


# --- linear layers ---------------------------------------------------------------------------------------


def packed_linear(quant: str, out_features: int = 24, in_features: int = 512) -> tuple[Linear, Tensor]:
    """A layer in a packed type and the weight that it stands for."""
    layer = Linear(in_features, out_features, dtype=torch.float32)
    layer.format = GGUF_FORMATS[quant]
    packed = quantize(rand(out_features, in_features, seed=5), quant)
    layer.weight = torch.nn.Parameter(packed, requires_grad=False)
    layer.bias = torch.nn.Parameter(rand(out_features, seed=6), requires_grad=False)
    return layer, dequantize_reference(packed, quant, (out_features, in_features))


@pytest.mark.parametrize("quant", TYPES)
def test_a_packed_layer_is_the_dense_one(quant: str) -> None:
    layer, weight = packed_linear(quant)
    x = rand(9, 512, seed=7)
    want = torch.nn.functional.linear(x, weight, layer.bias)
    scratch = Scratch(torch.device("cpu"), torch.float32, layer.scratch_elements(torch.float32))
    assert scratch.buffer.numel() == weight.numel()
    with torch.inference_mode():
        before = scratch.buffer.data_ptr()
        assert torch.equal(layer.prepare(torch.float32, scratch)(x), want)
        assert scratch.buffer.data_ptr() == before and scratch.used == weight.numel()
        assert torch.equal(layer(x), want)
        half = layer.format.dequantize(layer.packed(), torch.bfloat16)
    assert half.dtype == torch.bfloat16 and torch.equal(half, weight.bfloat16())


def test_low_rank_updates_fold_into_the_unpacked_weight() -> None:
    layer, weight = packed_linear("Q4_K")
    up, down, scale = rand(24, 12, seed=8), rand(12, 512, seed=9), torch.tensor([0.5] * 8 + [2.0] * 4)
    for name, tensor in (("lora_up", up), ("lora_down", down), ("lora_scale", scale)):
        layer.register_buffer(name, tensor)
    want = weight + 0.5 * up[:, :8] @ down[:8] + 2 * up[:, 8:] @ down[8:]
    x = rand(5, 512, seed=10)
    error = float((layer(x) - torch.nn.functional.linear(x, want, layer.bias)).abs().max())
    print(f"two LoRAs folded: max error {error:.1e}")
    assert error < 2e-4
    layer.lora_scale.zero_()  # strength 0 is no LoRA, bit for bit
    assert torch.equal(layer.format.dequantize(layer.packed(), torch.float32), weight)


def test_packed_layers_trace_as_a_whole() -> None:
    layer, weight = packed_linear("Q4_K")
    compiled = torch.compile(lambda x: layer.prepare(x.dtype)(x), backend="eager", fullgraph=True)
    x = rand(3, 512)
    with torch.inference_mode():
        assert torch.equal(compiled(x), torch.nn.functional.linear(x, weight, layer.bias))


def test_formats_are_recognised() -> None:
    info = TensorInfo("a.weight", torch.uint8, (4, 144), Path("a"), 0, 576, "Q4_K", (4, 256))
    assert format_for(info).name == "Q4_K"
    assert format_for(TensorInfo("a.weight", torch.float16, (4, 256), Path("a"), 0, 2048)) is PLAIN


# --- Wan -------------------------------------------------------------------------------------------------

CONFIG = WanConfig("t2v", 256, 512, 2, 2, text_dim=256, freq_dim=256)


def save_wan(path: Path, quant: str, prefix: str = "", drop_ones: bool = False) -> tuple[Path, WanModel]:
    """A tiny Wan as its linear weights in one type, the rest in F32 or F16, and the dense model that it stands for."""
    model = WanModel(CONFIG)
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear)}
    tensors: dict[str, tuple[Tensor, str]] = {}
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        values = rand(*parameter.shape, seed=seed) * (0.05 if parameter.ndim > 1 else 0.2)
        if name in linear and quant not in ("F32", "F16", "BF16"):
            packed = quantize(values, quant)
            parameter.data = dequantize_reference(packed, quant, values.shape)
            tensors[prefix + name] = (packed, quant)
            continue
        plain = "F16" if parameter.ndim == 1 else "F32"
        plain = quant if name in linear else plain
        stored = {"F16": torch.float16, "BF16": torch.bfloat16}.get(plain, torch.float32)
        parameter.data = values.to(stored).float()
        values = parameter.data.squeeze(0) if drop_ones and name.endswith("modulation") else parameter.data
        tensors[prefix + name] = (values, plain)
    return write_gguf(path, tensors), model.eval()


def velocity(model: WanModel) -> Tensor:
    with torch.inference_mode():
        return model(rand(1, 16, 2, 4, 4), torch.tensor([500.0]), rand(1, 8, 256, seed=1))


@pytest.mark.parametrize("quant", [*TYPES, "F16", "BF16", "F32"])
def test_a_wan_gguf_is_the_dense_model_bit_for_bit(tmp_path: Path, quant: str) -> None:
    path, dense = save_wan(tmp_path / "wan.gguf", quant)
    model = load_wan(path)
    assert model.state_dict().keys() == dense.state_dict().keys()
    got, want = velocity(model), velocity(dense)
    assert want.isfinite().all() and float(want.std()) > 0
    assert torch.equal(got, want)
    print(f"{quant}: {path.stat().st_size / 2**20:.2f} MiB, equal to the dense model of the unpacked weights")


def test_prefixes_and_dropped_dimensions(tmp_path: Path) -> None:
    path, dense = save_wan(tmp_path / "wan.gguf", "Q8_0", prefix="model.diffusion_model.", drop_ones=True)
    assert torch.equal(velocity(load_wan(path)), velocity(dense))


def test_a_models_names_and_shapes_become_the_files(tmp_path: Path) -> None:
    config, checkpoint = open_wan(save_wan(tmp_path / "wan.gguf", "Q4_K")[0])
    assert config == CONFIG
    model = WanModel(config, device="meta")
    assign_formats(model, checkpoint)
    assert model.blocks[0].ffn[0].format.name == "Q4_K"
    assert model.blocks[0].ffn[0].weight.dtype == torch.uint8
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == {
        name: info.shape for name, info in checkpoint.tensors.items()
    }


def test_blocks_run_from_flat_extents(tmp_path: Path) -> None:
    path, dense = save_wan(tmp_path / "wan.gguf", "Q4_K")
    config, checkpoint = open_wan(path)
    model = build_wan(config, checkpoint)
    layouts = [layout_block(checkpoint, f"blocks.{n}", block.state_dict()) for n, block in enumerate(model.blocks)]
    for block, layout in zip(model.blocks, layouts, strict=True):
        flat = torch.empty(layout.nbytes, dtype=torch.uint8)
        for place in layout.places:
            checkpoint.read_into(f"{layout.prefix}.{place.name}", flat[place.offset : place.offset + place.nbytes])
        bind(block, layout, flat)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            layer, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(layer), leaf, torch.nn.Parameter(checkpoint.read(name), requires_grad=False))
    assert torch.equal(velocity(model), velocity(dense))


def test_packed_tensors_that_belong_to_no_layer_are_unpacked_or_refused(tmp_path: Path) -> None:
    path, dense = save_wan(tmp_path / "wan.gguf", "F32")
    tensors = {name: (tensor, "F32") for name, tensor in dense.state_dict().items()}
    modulation = tensors["blocks.0.modulation"][0]
    tensors["blocks.0.modulation"] = (modulation, "Q8_0")
    want = dequantize_reference(quantize(modulation, "Q8_0"), "Q8_0", (6, 256)).view(1, 6, 256)
    assert torch.equal(load_wan(write_gguf(path, tensors)).blocks[0].modulation.data, want)
    with pytest.raises(CheckpointError, match=r"nothing\.weight"):
        load_wan(write_gguf(path, {**tensors, "blocks.0.nothing.weight": (modulation, "Q8_0")}))
    tensors["blocks.0.modulation"] = (tensors["blocks.1.modulation"][0], "F32")
    tensors["blocks.0.ffn.2.weight"] = (rand(256, 768), "Q4_K")
    with pytest.raises(CheckpointError, match=r"ffn\.2\.weight is \[256, 768\]"):
        load_wan(write_gguf(path, tensors))


def test_identification_names_the_types(tmp_path: Path) -> None:
    text = describe(identify(open_checkpoint(save_wan(tmp_path / "wan.gguf", "Q4_K")[0])))
    print(text)
    assert "Wan 2.1 T2V" in text and "Q4_K" in text and "float16" in text
