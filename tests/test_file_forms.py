"""Files as the field has them: markers, other shapes, other names, modules of their own, other ways to quantise."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lowvram_video.families.identify import describe, identify
from lowvram_video.memory.plan.footprint import Limits
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.wanvideo.checkpoint import open_wan
from lowvram_video.wanvideo.footprint import wan_work
from lowvram_video.wanvideo.lora_names import wan_aliases
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.network.model import Extras, WanModel
from lowvram_video.wanvideo.streamed import StreamedWan
from lowvram_video.weights.files.checkpoint import CheckpointError
from lowvram_video.weights.files.kinds import file_kind
from lowvram_video.weights.files.open import open_checkpoint
from lowvram_video.weights.linear.block_scaled import BlockScaled, block_size
from lowvram_video.weights.linear.fitting import holds_same
from lowvram_video.weights.linear.quantize import quantize_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from .quantizers import write_gguf
from .tiny import CONFIGS, load_wan, randomize

T2V = replace(CONFIGS["t2v"], num_layers=2)
VACE = replace(T2V, model_type="vace", num_layers=4, vace_layers=2, vace_channels=96)
Tensors = dict[str, Tensor]


def weights(config: WanConfig = T2V) -> Tensors:
    return {name: tensor.clone() for name, tensor in randomize(WanModel(config)).state_dict().items()}


def save(tensors: Tensors, path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


@torch.inference_mode()
def velocity(model: WanModel) -> Tensor:
    config, generator = model.config, torch.Generator().manual_seed(1)
    latent = torch.randn(1, config.in_channels, 2, 4, 6, generator=generator)
    text = torch.randn(1, 8, config.text_dim, generator=generator)
    control = torch.randn(1, 96, 2, 4, 6, generator=generator)
    extras = Extras(vace_frames=(control,), vace_strengths=(1.0,)) if config.vace_layers else Extras()
    return model(latent, torch.tensor([500.0]), text, extras=extras)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """What the model of `weights()` makes."""
    return velocity(load_wan(save(weights(), tmp_path_factory.mktemp("plain") / "wan.safetensors")))


# --- tensors that the model does not have ----------------------------------------------------------------

INERT = {
    "model_type.SkyReels-V2-T2V-14B-540P": torch.zeros(1),  # kohya-ss/musubi-tuner#237
    "model_type.Wan2_1-FLF2V-14B-720P": torch.zeros(0),
    "scheduler_step": torch.tensor(7),
    "training_config": torch.arange(40, dtype=torch.uint8),  # a text
    "freqs": torch.randn(1024, 64),
    "rope_embedder.inv_freq": torch.randn(22),
    "blocks.0.cross_attn.norm_added_q.weight": torch.ones(128),
    "ema.blocks.0.ffn.0.weight": torch.zeros(4, 4),
    "blocks.0.leftover": torch.zeros(0),
}


@pytest.mark.parametrize("name", INERT)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_what_changes_nothing_is_left_out(tmp_path: Path, plain: Tensor, name: str, prefix: str) -> None:
    tensors = {prefix + key: tensor for key, tensor in {**weights(), name: INERT[name]}.items()}
    path = save(tensors, tmp_path / "wan.safetensors")
    assert torch.equal(velocity(load_wan(path)), plain)
    StreamedWan(path, RunSettings()).make_plan(wan_work(T2V, (48, 32, 5)), Limits(1 << 60))
    assert "refused" not in describe(identify(open_checkpoint(path)))


@pytest.mark.parametrize(
    "extra",
    [
        {"blocks.0.gate": torch.ones(1)},  # one number, but of a block
        {"adapter.weight": torch.ones(4, 4)},
        {"blocks.0.ffn.0.lora_scale": torch.ones(2)},
    ],
)
def test_what_may_change_the_result_is_refused(tmp_path: Path, extra: Tensors) -> None:
    path = save({**weights(), **extra}, tmp_path / "wan.safetensors")
    with pytest.raises(CheckpointError, match=f"{next(iter(extra))}.*not known"):
        load_wan(path)


# --- the same numbers in another shape -------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(128, 64), (128, 16, 2, 2), (128, 16, 4), (2048, 1, 2, 2), (8192,)])
@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_first_convolutions_may_be_flat(tmp_path: Path, plain: Tensor, shape: tuple[int, ...], kind: str) -> None:
    """Comfy-Org/ComfyUI#7321, ngxson/diffusion-to-gguf#2."""
    tensors = weights()
    tensors["patch_embedding.weight"] = tensors["patch_embedding.weight"].reshape(shape)
    if kind == "gguf":
        path = write_gguf(tmp_path / "wan.gguf", {name: (tensor, "F32") for name, tensor in tensors.items()})
    else:
        path = save(tensors, tmp_path / "wan.safetensors")
    assert torch.equal(velocity(load_wan(path)), plain)


def test_all_convolutions_of_fun_models_may_be_flat(tmp_path: Path) -> None:
    config = replace(T2V, model_type="camera", in_channels=32, image_dim=24, camera_channels=24, reference_channels=16)
    tensors = weights(config)
    flat = {name: tensor.flatten(1) if tensor.ndim > 3 else tensor.squeeze() for name, tensor in tensors.items()}
    assert [name for name in tensors if flat[name].shape != tensors[name].shape]
    opened, model = open_wan(save(flat, tmp_path / "wan.safetensors"))[0], load_wan(tmp_path / "wan.safetensors")
    assert opened == config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name])


def test_packed_tensors_outside_the_linear_layers_are_unpacked(tmp_path: Path, plain: Tensor) -> None:
    """GGUF tools that quantise whatever they can: convolutions (with their shape beside), norms, modulation."""
    tensors = weights()
    small = ("patch_embedding.weight", "blocks.0.norm3.weight", "blocks.0.modulation", "head.modulation")
    stored = {name: (tensor, "Q8_0" if name in small else "F32") for name, tensor in tensors.items()}
    stored["patch_embedding.weight"] = (tensors["patch_embedding.weight"].reshape(-1, 256), "Q8_0")
    fields = {"comfy.gguf.orig_shape.patch_embedding.weight": [128, 16, 1, 2, 2]}
    model = load_wan(write_gguf(tmp_path / "wan.gguf", stored, fields=fields))
    assert model.patch_embedding.weight.dtype == torch.float32
    assert 0 < error(velocity(model), plain) < 0.01


def test_shapes_of_the_same_numbers() -> None:
    assert holds_same((256, 64), (256, 16, 1, 2, 2)) and holds_same((6, 128), (1, 6, 128))
    assert holds_same((128, 1, 1, 1), (128,)) and holds_same((16, 16, 1, 1), (16, 16)) and holds_same((), (1,))
    assert not holds_same((64, 256), (256, 16, 1, 2, 2))  # another order
    assert not holds_same((24,), (5, 5)) and not holds_same((6, 4), (4, 6)) and not holds_same((0,), (0, 5))


# --- VACE ------------------------------------------------------------------------------------------------


def to_diffusers(name: str) -> str:
    """By the names of diffusers' WanVACETransformer3DModel, which the test below compares."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    return next(iter(convert_wan_transformer_to_diffusers({name: torch.zeros(1)})))


def test_vace_in_diffusers_names(tmp_path: Path) -> None:
    """huggingface/diffusers#11878, ngxson/diffusion-to-gguf#2."""
    from diffusers import WanVACETransformer3DModel

    official = weights(VACE)
    theirs = {to_diffusers(name): tensor for name, tensor in official.items()}
    reference = WanVACETransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, text_dim=32, freq_dim=32, ffn_dim=192, num_layers=4,
        vace_layers=[0, 2], vace_in_channels=96,
    )  # fmt: skip
    reference.load_state_dict(theirs, strict=True)
    want = velocity(load_wan(save(official, tmp_path / "official.safetensors")))
    path = save(theirs, tmp_path / "diffusers.safetensors")
    assert torch.equal(velocity(load_wan(path)), want)
    aliases = wan_aliases(open_wan(path)[1].tensors)
    assert aliases["vace_blocks.1.proj_out"] == "vace_blocks.1.after_proj"
    assert aliases["vace_blocks.0.attn1.to_q"] == "vace_blocks.0.self_attn.q"


@pytest.fixture
def vace_files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A VACE model whole, and as its base and its module, as Kijai has them."""
    tensors = weights(VACE)
    parts = [
        {name: tensor for name, tensor in tensors.items() if name.startswith("vace") == module} for module in (0, 1)
    ]
    return (
        save(tensors, tmp_path / "whole.safetensors"),
        save(parts[0], tmp_path / "base.safetensors"),
        save(parts[1], tmp_path / "Wan2_1-VACE_module_1_3B.safetensors"),
    )


def test_a_vace_module_beside_its_base_is_the_whole(tmp_path: Path, vace_files: tuple[Path, Path, Path]) -> None:
    """kijai/ComfyUI-WanVideoWrapper#393, #756."""
    whole, base, module = vace_files
    config, merged = open_wan(base, module)
    assert config == open_wan(whole)[0]
    model = StreamedWan(base, RunSettings(), vace_module=module)
    model.start(model.make_plan(wan_work(config, (48, 32, 5)), Limits(1 << 60, blocks_to_swap=1)), None)
    want = load_wan(whole)
    with torch.inference_mode():
        assert error(velocity(model.model), velocity(want)) < 1e-6
    model.release()
    assert merged.tensors["vace_blocks.0.ffn.0.weight"].file == module
    assert open_wan(base, whole)[0] == config  # a whole VACE model has the module in it


def test_a_vace_module_that_does_not_fit_is_refused(tmp_path: Path, vace_files: tuple[Path, Path, Path]) -> None:
    whole, base, module = vace_files
    wide = save(weights(replace(T2V, dim=256, num_heads=2)), tmp_path / "wide.safetensors")
    for files, words in (
        ((module,), "this is a Wan VACE module.*load it as the VACE module, and a Wan transformer here"),
        ((whole, module), "a whole VACE model already.*leave the VACE module out"),
        ((wide, module), "a VACE module of width 128; wide.safetensors has 256.*choose the module for it"),
        ((base, base), "this is a Wan transformer; expected a VACE module.*choose such a file"),
    ):
        with pytest.raises(CheckpointError, match=words) as caught:
            open_wan(*files)
        assert not re.search("incomplete|download it again", str(caught.value))
    kind = file_kind(open_checkpoint(module).tensors)
    assert (kind.kind, kind.title) == ("wan vace module", "a Wan VACE module without its transformer")


def test_a_damaged_vace_module_is_named_and_not_its_base(tmp_path: Path, vace_files: tuple[Path, Path, Path]) -> None:
    _, base, module = vace_files
    tensors = load_file(module)
    linear = "vace_blocks.1.ffn.0.weight"
    for changed in (
        {name: tensor for name, tensor in tensors.items() if name != linear},
        {**tensors, "vace_blocks.1.other": tensors[linear].clone()},
        {**tensors, linear: tensors[linear].T.contiguous()},
        {name: tensor for name, tensor in tensors.items() if not name.startswith("vace_blocks.0.")},
        {name: tensor for name, tensor in tensors.items() if name != "vace_patch_embedding.weight"},
    ):
        damaged = save(changed, tmp_path / "damaged.safetensors")
        with pytest.raises(CheckpointError, match=r"damaged\.safetensors: .*vace"):
            StreamedWan(base, RunSettings(), vace_module=damaged)


# --- variants --------------------------------------------------------------------------------------------

VARIANTS = {
    "SkyReels-V2 Diffusion Forcing": {"fps_embedding.weight": torch.zeros(2, 128)},  # kohya-ss/musubi-tuner#237
    "ReCamMaster": {"blocks.0.cam_encoder.weight": torch.zeros(128, 12)},
    "UniAnimate": {"dwpose_embedding.0.weight": torch.zeros(4, 4)},
    "an audio-driven Wan (MultiTalk, InfiniteTalk)": {"blocks.0.audio_cross_attn.q_linear.weight": torch.zeros(4, 4)},
}


@pytest.mark.parametrize("title", VARIANTS)
def test_variants_are_named(tmp_path: Path, title: str) -> None:
    path = save({**weights(), **VARIANTS[title]}, tmp_path / "wan.safetensors")
    with pytest.raises(CheckpointError, match=f"this is {re.escape(title)}, which is not supported"):
        open_wan(path)
    assert title in describe(identify(open_checkpoint(path)))


def test_a_gguf_without_its_five_dimensional_tensors_says_so(tmp_path: Path) -> None:
    stored = {name: (tensor, "F32") for name, tensor in weights().items() if name != "patch_embedding.weight"}
    with pytest.raises(CheckpointError, match=r"GGUF tools leave out.*choose another release"):
        open_wan(write_gguf(tmp_path / "wan.gguf", stored))


# --- fp8 in blocks ---------------------------------------------------------------------------------------

WIDE = replace(T2V, dim=256, ffn_dim=576, num_heads=2)


def in_blocks(values: Tensor, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A weight in blocks of so many rows and columns: values, scales, and what the two stand for."""
    out, scales, truth = torch.empty_like(values, dtype=dtype), [], torch.empty_like(values)
    most = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    for top in range(0, len(values), rows):
        line = []
        for left in range(0, values.shape[1], columns):
            place = slice(top, top + rows), slice(left, left + columns)
            scale = values[place].abs().amax() / most
            ratio = values[place] / scale
            out[place] = (ratio.round() if dtype == torch.int8 else ratio).to(dtype)
            truth[place] = out[place].float() * scale
            line.append(scale)
        scales.append(torch.stack(line))
    return out, torch.stack(scales), truth


BLOCKWISE = {
    "musubi-tuner, [out, n, 1]": (1, 64, "scale_weight", torch.float8_e4m3fn),  # kohya-ss/musubi-tuner PR 575
    "DeepSeek, 128 x 128": (128, 128, "weight_scale_inv", torch.float8_e4m3fn),
    "LightX2V, 128 x 128": (128, 128, "weight_scale", torch.float8_e5m2),
    "rows of 32": (1, 32, "weight_scale", torch.float8_e4m3fn),
    "int8, 64 x 64": (64, 64, "weight_scale", torch.int8),
}


@pytest.mark.parametrize("name", BLOCKWISE)
def test_scales_of_blocks(tmp_path: Path, name: str) -> None:
    rows, columns, leaf, dtype = BLOCKWISE[name]
    stored, truth = weights(WIDE), weights(WIDE)
    for key, tensor in weights(WIDE).items():
        if re.fullmatch(r"blocks\.\d+\..*weight", key) and tensor.ndim == 2:
            stored[key], scale, truth[key] = in_blocks(tensor, rows, columns, dtype)
            stored[key.replace(".weight", f".{leaf}")] = scale[..., None] if rows == 1 and columns == 64 else scale
    path = save(stored, tmp_path / "blocks.safetensors")
    want = velocity(load_wan(save(truth, tmp_path / "truth.safetensors")))
    model = load_wan(path)
    assert isinstance(model.blocks[0].ffn[0].format, BlockScaled)
    assert error(velocity(model), want) < 1e-6
    rowwise = quantize_checkpoint(open_wan(path)[1], "fp8")  # a run in fp8 makes scales per row of it
    made = rowwise.read("blocks.1.ffn.0.weight").float() * rowwise.read("blocks.1.ffn.0.weight_scale")
    assert error(made, truth["blocks.1.ffn.0.weight"]) < 0.04


@pytest.mark.parametrize(
    ("size", "count", "side"), [(5120, 40, 128), (576, 5, 128), (200, 2, 128), (96, 3, 32), (60, 3, 20)]
)
def test_sides_of_blocks(size: int, count: int, side: int) -> None:
    assert block_size(size, count) == side
    assert block_size(60, 7) is None and block_size(4, 5) is None and block_size(4, 0) is None
