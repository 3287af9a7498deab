"""framepack/checkpoint.py: layouts and dialects, dimensions, base or F1, wrong files; inspect and convert."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FluxTransformer2DModel,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
)
from lowvram_video.cli.main import main
from lowvram_video.families.identify import describe, identify
from lowvram_video.framepack.checkpoint import (
    MODEL_TYPE_KEY,
    ROPE_AXES_KEY,
    build_framepack,
    infer_config,
    open_framepack,
    told_model_type,
)
from lowvram_video.framepack.network.config import FramePackConfig
from lowvram_video.framepack.network.model import FramePackModel
from lowvram_video.weights.files.checkpoint import Checkpoint, CheckpointError, TensorInfo
from lowvram_video.weights.files.kinds import file_kind
from lowvram_video.weights.files.open import open_checkpoint
from lowvram_video.weights.linear.adopt import load_tensors
from lowvram_video.weights.linear.linear import Linear
from lowvram_video.weights.linear.quantize import quantize_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from .test_fp8 import DIALECTS as FP8_DIALECTS
from .test_int8 import DIALECTS as INT8_DIALECTS
from .test_int8 import GROUP, hadamard
from .tiny import load_wan
from .tiny_framepack import CONFIG, LAYOUTS, WIDE, make_tensors, metadata_of, save_framepack, save_framepack_gguf


def same(model: FramePackModel, tensors: dict[str, Tensor]) -> bool:
    state = model.state_dict()
    return state.keys() == tensors.keys() and all(torch.equal(state[name], tensors[name]) for name in tensors)


def is_quantised(name: str) -> bool:
    """Written out, not taken from the code under test: linear layers of the blocks but modulation and norms."""
    return name.startswith(("transformer_blocks", "single_")) and name.endswith(".weight") and "norm" not in name


def save(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(stored, path, {**metadata_of(CONFIG), **metadata})
    return path


def load_framepack(path: Path) -> FramePackModel:
    config, checkpoint = open_framepack(path)
    return load_tensors(build_framepack(config, checkpoint), checkpoint)


def refused(path: Path, *words: str, load: Callable[[Path], object] = load_framepack) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    print(message)
    assert "\n" not in message and path.name in message
    for word in ("expected", *words):
        assert word in message
    return message


# --- layouts and dialects --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_to_the_same_model(layout: str, tmp_path: Path) -> None:
    chosen = save_framepack(tmp_path / "FramePackI2V.safetensors", layout=layout)
    paths = [chosen]
    if layout == "shards":
        paths += [next(chosen.glob("*.index.json")), sorted(chosen.glob("*.safetensors"))[1]]
        assert len(list(chosen.glob("diffusion_pytorch_model-*-of-00003.safetensors"))) == 3
    for path in paths:
        model = load_framepack(path)
        assert model.config == CONFIG
        assert same(model, make_tensors())
        assert not any(parameter.requires_grad for parameter in model.parameters())
    print(f"{layout}: {len(make_tensors())} tensors identical from {len(paths)} paths")


def test_a_folder_that_diffusers_saves(tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = HunyuanVideoFramepackTransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, num_layers=1, num_single_layers=2, num_refiner_layers=1,
        text_embed_dim=24, pooled_projection_dim=12, image_proj_dim=20, has_image_proj=True, has_clean_x_embedder=True,
    )  # fmt: skip
    reference.save_pretrained(tmp_path / "transformer", max_shard_size="2MB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    model = load_framepack(tmp_path / "transformer")
    assert same(model, reference.state_dict())
    assert (model.config.num_heads, model.config.rope_axes, model.config.num_refiner_layers) == (1, (16, 56, 56), 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_stored_dtypes_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    """bf16, and Kijai's fp8: a bare cast of the blocks."""
    tensors = {n: t.to(dtype if is_quantised(n) else torch.bfloat16) for n, t in make_tensors().items()}
    assert same(load_framepack(save(tmp_path / "framepack.safetensors", tensors)), tensors)


@pytest.mark.parametrize("dialect", [*FP8_DIALECTS, *INT8_DIALECTS])
def test_each_dialect_gives_the_weights_it_stands_for(dialect: str, tmp_path: Path) -> None:
    tensors = make_tensors(replace(CONFIG, num_heads=4))  # rotations take columns in groups of 64
    rotated = False
    if dialect in FP8_DIALECTS:
        write, per_row, dtype, _ = FP8_DIALECTS[dialect]
        largest = torch.finfo(dtype).max
    else:
        writer, per_row, rotated = INT8_DIALECTS[dialect]
        write, dtype, largest = (lambda rest, layers: (writer(rest, layers), {})), torch.int8, 127
    layers, truth = {}, {}
    for name, tensor in tensors.items():
        if is_quantised(name):
            weight = turned(tensor) if rotated else tensor
            scale = (weight.abs().amax(1, keepdim=True) if per_row else weight.abs().max()) / largest
            values = (weight / scale).round().to(dtype) if dtype == torch.int8 else (weight / scale).to(dtype)
            layers[name.removesuffix(".weight")] = values, scale
            stood = (values.double() * scale.double()).float()
            truth[name] = turned(stood) if rotated else stood
    stored, metadata = write({n: t for n, t in tensors.items() if n not in truth}, layers)
    model = load_framepack(save(tmp_path / "framepack.safetensors", stored, **metadata))
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items() if name not in truth)
    largest_error = 0.0
    for name, want in truth.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        got = layer.format.dequantize(layer.packed(), torch.float32)
        error = float(((got - want).abs() / want.abs().clamp_min(1e-3)).max())
        largest_error = max(largest_error, error)
    print(f"{dialect}: {len(truth)} weights, max relative error {largest_error:.1e}")
    # a rotation is a sum of 64 products in fp32; else it is one product
    assert largest_error < (2e-4 if rotated else 1e-6)


def turned(weight: Tensor) -> Tensor:
    return (weight.double().unflatten(1, (-1, GROUP)) @ hadamard(GROUP)).flatten(1).float()


@pytest.mark.parametrize(
    ("quant", "flat", "plain"), [("Q8_0", False, "F16"), ("Q4_K", True, "BF16"), ("Q6_K", True, "F32")]
)
def test_gguf_gives_the_weights_it_stands_for(quant: str, flat: bool, plain: str, tmp_path: Path) -> None:
    path, truth = save_framepack_gguf(tmp_path / "framepack.gguf", quant, flat=flat, plain=plain)
    model = load_framepack(path)
    assert model.config == WIDE
    for name, tensor in model.state_dict().items():
        layer = model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, Linear) and name.endswith(".weight"):
            assert layer.format.name == quant
            tensor = layer.format.dequantize(layer.packed(), torch.float32)
        assert tensor.dtype == truth[name].dtype and torch.equal(tensor, truth[name]), name
    assert model.clean_x_embedder.proj_4x.weight.shape == (256, 16, 4, 8, 8)
    identity = identify(open_checkpoint(path))
    assert "16 -> 16 channels" in identity.config and quant in {part.dtype for part in identity.parts}


# --- dimensions ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released() -> Checkpoint:
    """The published model's header, from diffusers' class."""
    with torch.device("meta"):
        reference = HunyuanVideoFramepackTransformer3DModel(
            num_refiner_layers=2, image_proj_dim=1152, has_image_proj=True, has_clean_x_embedder=True
        )
    return header_of(reference, Path("FramePackI2V_HY_bf16.safetensors"))


def header_of(model: torch.nn.Module, path: Path, prefix: str = "") -> Checkpoint:
    """A checkpoint in bf16 of which only the header exists."""
    tensors, offset = {}, 0
    for name, tensor in model.state_dict().items():
        info = TensorInfo(prefix + name, torch.bfloat16, tuple(tensor.shape), path, offset, 2 * tensor.numel())
        tensors[info.name] = info
        offset += info.nbytes
    return Checkpoint(path, tensors, {})


def test_dimensions_of_the_published_model(released: Checkpoint) -> None:
    assert infer_config(released) == FramePackConfig()
    model = build_framepack(FramePackConfig(), released)
    num = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(released.tensors)} tensors, {num:,} parameters")
    assert (len(released.tensors), num) == (1274, 12_874_314_816)


def test_packed_dimensions_are_the_logical_ones(released: Checkpoint) -> None:
    packed = {
        name: replace(info, shape=(*info.shape[:-1], 7), dtype=torch.uint8, quant="Q4_K", logical_shape=info.shape)
        if len(info.shape) == 2
        else info
        for name, info in released.tensors.items()
    }
    assert infer_config(replace(released, tensors=packed)) == FramePackConfig()


def test_heads_of_another_width_need_metadata(tmp_path: Path) -> None:
    path, tensors = tmp_path / "framepack.safetensors", make_tensors()
    assert load_framepack(save(path, tensors)).config.rope_axes == (4, 6, 6)
    for axes in ("4,6", "4,6,8", "5,5,6", "a,b,c", "16,0,0"):
        refused(save(path, tensors, **{ROPE_AXES_KEY: axes}), repr(axes), "add up to 16")
    save_file(tensors, path)
    refused(path, "heads of 16 and no axes", f"write {ROPE_AXES_KEY}")


# --- base or F1 ------------------------------------------------------------------------------------------

PATHS = {
    "FramePackI2V_HY_bf16.safetensors": "base",
    "FramePackI2V_HY_fp8_e4m3fn.safetensors": "base",
    "FramePack_F1_I2V_HY_20250503.safetensors": "f1",
    "FramePackF1I2V_fp8.safetensors": "f1",
    "framepack-f1-q4_k.gguf": "f1",
    "F1_bf16.safetensors": "f1",
    "model_bf16_f16.safetensors": "base",
    "conf1.safetensors": "base",
    "FramePack_F1_I2V_HY_20250503/diffusion_pytorch_model.safetensors.index.json": "f1",
    "FramePackI2V_HY/diffusion_pytorch_model.safetensors.index.json": "base",
    "models--lllyasviel--FramePack_F1_I2V_HY_20250503/snapshots/f1c2/x-00001-of-00003.safetensors": "f1",
    "models--lllyasviel--FramePackI2V_HY/snapshots/f1/x-00001-of-00003.safetensors": "base",
    "FramePack F1/FramePackI2V_HY_bf16.safetensors": "base",
    "f1/model.safetensors": "base",
}


@pytest.mark.parametrize("path", PATHS)
def test_f1_is_told_by_the_name(path: str) -> None:
    assert told_model_type(Checkpoint(Path("/models") / path, {}, {})) == PATHS[path]


def test_f1_is_told_by_metadata_and_the_caller(tmp_path: Path) -> None:
    path = save_framepack(tmp_path / "FramePack_F1.safetensors")
    assert open_framepack(path)[0].model_type == "f1"
    for model_type in ("base", "f1"):
        config, checkpoint = open_framepack(path, model_type)
        assert config.model_type == checkpoint.metadata[MODEL_TYPE_KEY] == model_type
    with pytest.raises(ValueError, match="model_type is 'F2'; expected one of auto, base, f1"):
        open_framepack(path, "F2")
    base = save_framepack(tmp_path / "framepack.safetensors", replace(CONFIG, model_type="f1"))
    assert open_framepack(base)[0].model_type == "f1"
    tensors = make_tensors()
    assert open_framepack(save(base, tensors, title="FramePack F1 by me"))[0].model_type == "f1"
    assert open_framepack(save(base, tensors, title="mix of bf16"))[0].model_type == "base"
    assert open_framepack(save(path, tensors, **{MODEL_TYPE_KEY: "base"}))[0].model_type == "base"
    refused(save(path, tensors, **{MODEL_TYPE_KEY: "F3"}), "'F3'", "base or f1")
    assert open_framepack(path, "f1")[0].model_type == "f1"


# --- files that do not fit -------------------------------------------------------------------------------


def test_incomplete_and_mixed_files(tmp_path: Path) -> None:
    path, tensors = tmp_path / "framepack.safetensors", make_tensors()
    less = {name: tensor for name, tensor in tensors.items() if "attn.to_q" not in name}
    refused(save(path, less), "lacks 12 tensors", "this FramePack transformer", "download it again")
    for stem, number in (("single_transformer_blocks", 0), ("transformer_blocks", 1)):
        gap = {n.replace(f"{stem}.1.", f"{stem}.2."): t for n, t in tensors.items()} if number else None
        less = gap or {n: t for n, t in tensors.items() if not n.startswith(f"{stem}.0.")}
        refused(save(path, less), f"block {number} is missing ({stem}.{number})", "download it again")
    less = {name: tensor for name, tensor in tensors.items() if not name.startswith("single_")}
    refused(save(path, less), "without single_transformer_blocks.0", "incomplete")
    less = {name: tensor for name, tensor in tensors.items() if not name.startswith("image_projection.")}
    refused(save(path, less), "without image_projection.up.weight", "incomplete")
    refused(save(path, {**tensors, "adapter.weight": torch.zeros(2)}), "1 tensor (adapter.weight) not known", "variant")
    mixed = {**tensors, "transformer_blocks.1.ff.net.2.weight": torch.zeros(32, 96)}
    refused(save(path, mixed), "transformer_blocks.1.ff.net.2.weight is [32, 96]; expected [32, 128]", "mixes two")
    refused(save(path, {**tensors, "transformer_blocks.0.attn.norm_q.weight": torch.zeros(12)}), "mixes two models")
    flat = {**tensors, "x_embedder.proj.weight": torch.zeros(32, 66)}
    refused(save(path, flat), "x_embedder.proj.weight has shape [32, 66]; expected 5 dimensions", "choose another file")


HUNYUAN_ORIGINAL = ["double_blocks.0.img_attn_qkv.weight", "txt_in.individual_token_refiner.blocks.0.norm1.weight"]
WRONG_FILES = {
    "a HunyuanVideo transformer": (HUNYUAN_ORIGINAL, ("ComfyUI's own loader", "choose a FramePack transformer file")),
    "a LoRA": (["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"], ("as a LoRA, on top of a FramePack",)),
    "a Wan transformer": (["patch_embedding.weight", "blocks.0.cross_attn.norm_q.weight"], ("with the Wan loader",)),
    "a Wan VAE": (["decoder.middle.0.residual.0.gamma", "conv2.weight"], ("choose a FramePack transformer file",)),
    "a HunyuanVideo VAE": (["decoder.conv_in.conv.weight", "post_quant_conv.weight"], ("as the VAE, and a FramePack",)),
    "a SigLIP vision model": (
        ["vision_model.encoder.layers.0.mlp.fc1.weight", "vision_model.head.probe"],
        ("as the CLIP vision model",),
    ),
    "a LLaMA text encoder": (["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"], ("choose a",)),
    "no known model (1 tensor (some.weight))": (["some.weight"], ("FramePackI2V_HY_…",)),
}


@pytest.mark.parametrize("title", WRONG_FILES)
def test_the_wrong_file_is_named(title: str, tmp_path: Path) -> None:
    names, words = WRONG_FILES[title]
    path = save(tmp_path / "wrong.safetensors", {name: torch.zeros(2, 2) for name in names})
    refused(path, f"this is {title}", "a FramePack or FramePack F1 transformer", *words)


def test_foreign_models_are_told_apart(tmp_path: Path) -> None:
    """By the names that diffusers writes."""
    with torch.device("meta"):
        models = {
            "a HunyuanVideo transformer": HunyuanVideoTransformer3DModel(num_layers=1, num_single_layers=1),
            "a Flux transformer (diffusers)": FluxTransformer2DModel(num_layers=1, num_single_layers=1),
            "a HunyuanVideo VAE": AutoencoderKLHunyuanVideo(block_out_channels=(32, 32, 32, 32)),
            "a FramePack transformer": HunyuanVideoFramepackTransformer3DModel(has_clean_x_embedder=True),
        }
    for title, model in models.items():
        assert file_kind(model.state_dict()).title == title
    refused(save_framepack(tmp_path / "framepack.safetensors"), "with the FramePack loader", load=load_wan)


# --- inspect and convert ---------------------------------------------------------------------------------


def test_inspecting_says_what_it_is(released: Checkpoint) -> None:
    identity = identify(released)
    text = describe(identity)
    print(text)
    assert identity.title.startswith("FramePack I2V 12.9B (neither its name nor its metadata says F1)")
    dim, mlp = 3072, 12288
    double = 2 * ((6 + 4) * (dim + 1) * dim + (dim + 1) * mlp + (mlp + 1) * dim) + 4 * 128
    single = (3 + 3) * (dim + 1) * dim + (dim + 1) * mlp + (dim + mlp + 1) * dim + 2 * 128
    assert identity.num_blocks == 60 and identity.block_bytes == (2 * single, 2 * double)
    for words in (
        "dim 3072, mlp 12288, 24 heads x 128, 20 double and 40 single blocks, 16 -> 16 channels",
        "llava_llama3", "hunyuan_video_vae", "sigclip_vision", "270.06 MiB to 648.18 MiB, 60 blocks",
    ):  # fmt: skip
        assert words in text
    f1 = identify(replace(released, path=Path("FramePack_F1_I2V_HY_20250503.safetensors")))
    assert f1.title == "FramePack F1 I2V 12.9B (by its name or metadata)"
    prefixed = identify(released.renamed({name: f"model.diffusion_model.{name}" for name in released.tensors}))
    assert prefixed == identity


def test_inspecting_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(save_framepack(tmp_path / "shards", layout="shards"))]) == 0
    out = capsys.readouterr().out
    print(out)
    assert "2 heads x 16, 2 double and 2 single blocks" in out and "needs       text encoders: of width 24" in out
    path = save_framepack(tmp_path / "framepack.safetensors")
    tensors = load_file(path)
    save_file(tensors, path)  # without metadata
    assert main(["inspect", str(path)]) == 0
    assert "heads of 16 and no axes" in capsys.readouterr().out


@pytest.mark.parametrize(("file_format", "bound"), [("fp8", 0.04), ("fp8_rows", 0.04), ("int8", 0.01)])
def test_a_converted_file_holds_the_model(
    file_format: str, bound: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_framepack(tmp_path / "FramePack_F1_I2V.safetensors", dtype=torch.bfloat16, layout="prefix")
    target = tmp_path / "small.safetensors"
    assert main(["convert", str(source), str(target), "--to", file_format, "--device", "cpu"]) == 0
    assert "small.safetensors" in capsys.readouterr().out
    config, checkpoint = open_framepack(target)
    assert config == replace(CONFIG, model_type="f1")  # though its new name does not say so
    assert quantize_checkpoint(checkpoint, file_format.partition("_")[0]) is checkpoint
    model, tensors = load_framepack(target), {name: t.bfloat16() for name, t in make_tensors().items()}
    largest_error = 0.0
    for name, want in tensors.items():
        layer = model.get_submodule(name.rpartition(".")[0])
        if not is_quantised(name):
            assert torch.equal(model.get_parameter(name), want), name
            continue
        assert checkpoint.tensors[name].quant is not None
        got = layer.format.dequantize(layer.packed(), torch.float32)
        largest_error = max(largest_error, float((got - want).norm() / want.float().norm()))
    print(f"{file_format}: max relative error of a weight {largest_error:.4f}")
    assert 0 < largest_error < bound
    if file_format == "int8":
        marker = load_file(target)["single_transformer_blocks.1.proj_out.comfy_quant"]
        assert json.loads(bytes(marker.tolist())) == {"format": "int8_tensorwise"}


def test_other_files_are_not_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "wrong.safetensors", {name: torch.zeros(2, 2) for name in HUNYUAN_ORIGINAL})
    assert main(["convert", str(path), str(tmp_path / "new.safetensors"), "--to", "fp8"]) == 2
    error = capsys.readouterr().err
    assert "this is a HunyuanVideo transformer; expected a Wan or FramePack transformer; choose such a file" in error
