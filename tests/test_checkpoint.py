"""wanvideo/checkpoint.py and families/identify.py: layouts, dimensions, memory while loading, and every wrong file."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from lowvram_video.families.identify import describe, identify
from lowvram_video.wanvideo.checkpoint import (
    NUM_HEADS_KEY,
    infer_config,
    official_names,
    open_wan,
)
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.network.model import WanModel
from lowvram_video.weights.files.checkpoint import Checkpoint, CheckpointError, TensorInfo
from lowvram_video.weights.files.kinds import file_kind
from lowvram_video.weights.linear.adopt import is_quantisation_name
from safetensors.torch import load_file, save_file

from .tiny import load_wan

TINY = {"dim": 256, "ffn_dim": 96, "num_heads": 2, "num_layers": 2, "text_dim": 24, "freq_dim": 32}
MODELS = {
    "t2v": WanConfig("t2v", **TINY),
    "i2v": WanConfig("i2v", in_channels=36, image_dim=20, **TINY),
    "i2v 2.2": WanConfig("i2v", in_channels=36, **TINY),
    "flf2v": WanConfig("flf2v", in_channels=36, image_dim=20, image_pos_tokens=14, **TINY),
    "ti2v": WanConfig("ti2v", in_channels=48, out_channels=48, **TINY),
}
LAYOUTS = ["official", "model.diffusion_model.", "diffusion_model.", "model.", "transformer.", "shards", "diffusers"]

# The table of released models; every dimension that shapes tell.
RELEASED = {
    "Wan 2.1 T2V 1.3B": WanConfig("t2v", 1536, 8960, 12, 30),
    "Wan 2.1 T2V 14B or Wan 2.2 T2V A14B, one of two experts": WanConfig("t2v", 5120, 13824, 40, 40),
    "Wan 2.1 I2V 14B": WanConfig("i2v", 5120, 13824, 40, 40, 36, 16, image_dim=1280),
    "Wan 2.1 FLF2V 14B": WanConfig("flf2v", 5120, 13824, 40, 40, 36, 16, image_dim=1280, image_pos_tokens=514),
    "Wan 2.2 I2V A14B, one of two experts": WanConfig("i2v", 5120, 13824, 40, 40, 36, 16),
    "Wan 2.2 TI2V 5B": WanConfig("ti2v", 3072, 14336, 24, 30, 48, 48),
    "Wan VACE 1.3B": WanConfig("vace", 1536, 8960, 12, 30, vace_layers=15, vace_channels=96),
    "Wan VACE 14B": WanConfig("vace", 5120, 13824, 40, 40, vace_layers=8, vace_channels=96),
    "Wan Fun Control 14B": WanConfig("control", 5120, 13824, 40, 40, 52, 16, reference_channels=16),
    "Wan Fun Camera 1.3B": WanConfig("camera", 1536, 8960, 12, 30, 32, 16, image_dim=1280, camera_channels=24),
}


def official_tensors(config: WanConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = WanModel(config, device="meta").state_dict()
    return {name: torch.randn(tensor.shape, generator=generator) * 0.1 for name, tensor in shapes.items()}


def diffusers_tensors(config: WanConfig, official: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' own conversion, proved by loading it strictly into diffusers' own model."""
    positions = official.get("img_emb.emb_pos")
    state = convert_wan_transformer_to_diffusers({k: v for k, v in official.items() if k != "img_emb.emb_pos"})
    if positions is not None:  # diffusers' single-file conversion leaves this one out
        state["condition_embedder.image_embedder.pos_embed"] = positions
    reference = WanTransformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=128,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        image_dim=config.image_dim or None,
        added_kv_proj_dim=config.dim if config.image_dim else None,
        pos_embed_seq_len=config.image_pos_tokens or None,
    )
    reference.load_state_dict(state, strict=True)
    return reference.state_dict()


def write_layout(folder: Path, layout: str, config: WanConfig) -> Path:
    """A model file in one of LAYOUTS; returns what a user would choose."""
    official = official_tensors(config)
    path = folder / "model.safetensors"
    if layout == "shards":
        weight_map = {name: f"model-{1 + i % 3:05d}-of-00003.safetensors" for i, name in enumerate(official)}
        for file in set(weight_map.values()):
            save_file({name: official[name] for name in official if weight_map[name] == file}, folder / file)
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    elif layout == "diffusers":
        save_file(diffusers_tensors(config, official), path)
    else:
        prefix = "" if layout == "official" else layout
        save_file({prefix + name: tensor for name, tensor in official.items()}, path)
    return path


def velocity(model: WanModel) -> torch.Tensor:
    config, generator = model.config, torch.Generator().manual_seed(1)
    latent = torch.randn(1, config.in_channels, 2, 4, 4, generator=generator)
    context = torch.randn(1, 8, config.text_dim, generator=generator)
    image = torch.randn(1, config.image_pos_tokens or 7, config.image_dim, generator=generator)
    with torch.inference_mode():
        return model(latent, torch.tensor([500.0]), context, image if config.image_dim else None)


def fake_checkpoint(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16, **metadata: str
) -> Checkpoint:
    """A checkpoint of which only the header exists."""
    tensors, offset, path = {}, 0, Path("fake.safetensors")
    for name, shape in shapes.items():
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        tensors[name] = TensorInfo(name, dtype, tuple(shape), path, offset, nbytes)
        offset += nbytes
    return Checkpoint(path, tensors, metadata)


def shapes_of(config: WanConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in WanModel(config, device="meta").state_dict().items()}


def write_names(path: Path, names: list[str]) -> Path:
    save_file({name: torch.zeros(2, 2) for name in names}, path)
    return path


def refused(path: Path, *words: str, load=load_wan) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    print(message)
    assert "\n" not in message
    assert path.name in message
    for word in ("expected", *words):
        assert word in message
    return message


# --- layouts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_every_layout_loads_to_the_same_model(tmp_path, model):
    config = MODELS[model]
    official = official_tensors(config)
    want = None
    for layout in LAYOUTS:
        folder = tmp_path / layout.replace(".", "_")
        folder.mkdir()
        loaded = load_wan(write_layout(folder, layout, config))
        assert loaded.config == config, layout
        state = loaded.state_dict()
        assert list(state) == list(official)
        assert all(torch.equal(state[name], official[name]) for name in official), layout
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        want = velocity(loaded) if want is None else want
        assert torch.isfinite(want).all() and torch.equal(velocity(loaded), want), layout
    print(f"{model}: {len(LAYOUTS)} layouts, {len(official)} tensors and the velocity identical")


def test_stored_dtypes_are_kept(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = official_tensors(MODELS["t2v"])
    mixed = {n: t.to(torch.float8_e4m3fn if n.endswith("ffn.0.weight") else torch.bfloat16) for n, t in tensors.items()}
    save_file(mixed, path)
    state = load_wan(path).state_dict()
    assert {name: tensor.dtype for name, tensor in state.items()} == {n: t.dtype for n, t in mixed.items()}


def test_quantisation_tensors_move_with_their_layer():
    names = official_names(
        [
            "patch_embedding.weight",
            "condition_embedder.time_proj.weight",
            "condition_embedder.time_proj.weight_scale",
            "blocks.11.attn1.to_out.0.scale_weight",
            "blocks.1.attn2.add_k_proj.comfy_quant",
            "blocks.1.ffn.net.0.proj.input_scale",
            "scaled_fp8",
        ]
    )
    assert list(names.values()) == [
        "patch_embedding.weight",
        "time_projection.1.weight",
        "time_projection.1.weight_scale",
        "blocks.11.self_attn.o.scale_weight",
        "blocks.1.cross_attn.k_img.comfy_quant",
        "blocks.1.ffn.0.input_scale",
        "scaled_fp8",
    ]
    assert [is_quantisation_name(name) for name in names.values()] == [False, False, True, True, True, True, True]


def test_only_a_prefix_of_the_transformer_is_stripped():
    mixed = ["model.diffusion_model.blocks.0.ffn.0.weight", "model.diffusion_model.head.modulation", "model.other.x"]
    assert list(official_names(mixed).values()) == ["blocks.0.ffn.0.weight", "head.modulation", "model.other.x"]
    for foreign in (["model.layers.0.mlp.weight"], ["transformer.h.0.attn.weight"]):
        assert official_names(foreign) == {foreign[0]: foreign[0]}


def test_an_all_in_one_file_gives_its_transformer(tmp_path):
    config = MODELS["t2v"]
    path = write_layout(tmp_path, "model.diffusion_model.", config)
    others = [
        "vae.decoder.conv1.weight",
        "text_encoders.umt5xxl.transformer.shared.weight",
        "text_encoders.spiece_model",
    ]
    save_file(load_file(path) | {name: torch.zeros(4) for name in others}, path)
    model = load_wan(path)
    assert model.config == config
    assert set(model.state_dict()) == set(official_tensors(config))


# --- dimensions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("title", RELEASED)
def test_dimensions_and_title_of_every_released_model(title):
    config = RELEASED[title]
    checkpoint = fake_checkpoint(shapes_of(config))
    assert infer_config(checkpoint) == config
    identity = identify(checkpoint)
    assert (identity.kind, identity.title, identity.num_blocks) == ("wan transformer", title, config.num_layers)
    assert identity.total_bytes == 2 * sum(torch.Size(shape).numel() for shape in shapes_of(config).values())
    print(describe(identity))


def test_dimensions_of_packed_tensors_are_the_logical_ones():
    config = RELEASED["Wan 2.1 T2V 1.3B"]
    checkpoint = fake_checkpoint(shapes_of(config))
    packed = {
        name: replace(info, shape=(7,), dtype=torch.uint8, quant="Q4_K", logical_shape=info.shape)
        for name, info in checkpoint.tensors.items()
    }
    checkpoint = Checkpoint(checkpoint.path, packed, {})
    assert infer_config(checkpoint) == config
    assert {part.dtype for part in identify(checkpoint).parts} == {"Q4_K"}


def test_heads_of_another_width_come_from_the_metadata(tmp_path):
    config = replace(MODELS["t2v"], dim=96, num_heads=4)
    path = tmp_path / "tiny.safetensors"
    save_file(official_tensors(config), path, metadata={NUM_HEADS_KEY: "4"})
    assert open_wan(path)[0] == config
    save_file(official_tensors(config), path, metadata={NUM_HEADS_KEY: "5"})
    refused(path, "'5'", "write that key")
    save_file(official_tensors(config), path)
    refused(path, "dim 96 with no number of heads", "write that key")


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("face_adapter.fuser_blocks.0.k_norm.weight", "Wan 2.2 Animate"),
        ("casual_audio_encoder.encoder.final_linear.weight", "Wan 2.2 S2V"),
        ("audio_proj.audio_proj_glob_1.layer.bias", "an audio-driven Wan (HuMo, InfiniteTalk)"),
    ],
)
def test_a_variant_is_named_and_refused(tmp_path, name, title):
    path = tmp_path / "model.safetensors"
    save_file(official_tensors(MODELS["t2v"]) | {name: torch.zeros(2, 2)}, path)
    refused(path, title, "not supported by this loader yet", "choose one of those", load=open_wan)
    identity = identify(fake_checkpoint(shapes_of(MODELS["t2v"]) | {name: (2, 2)}))
    assert (identity.title, identity.config) == (title, "not supported yet")


def test_unknown_channels_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(official_tensors(replace(MODELS["i2v"], in_channels=46)), path)
    refused(path, "46 input and 16 output channels", "not supported by this loader yet", "choose one of those")


# --- files that do not fit -------------------------------------------------------------------------------


def test_missing_tensors(tmp_path):
    path = write_layout(tmp_path, "diffusers", MODELS["t2v"])
    state = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("blocks.1.attn1.to_")}
    save_file(state, path)
    refused(path, "lacks 8 tensors (blocks.1.self_attn.", ", …)", "download it again")


def test_missing_tensors_that_tell_the_size(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = official_tensors(MODELS["t2v"])
    del tensors["text_embedding.0.weight"]
    save_file(tensors, path)
    refused(path, "without text_embedding.0.weight", "download it again")


def test_a_missing_block(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = official_tensors(replace(MODELS["t2v"], num_layers=3))
    save_file({name: tensor for name, tensor in tensors.items() if not name.startswith("blocks.1.")}, path)
    refused(path, "block 1 is missing", "download it again")


def test_unknown_tensors(tmp_path):
    path = tmp_path / "model.safetensors"
    extra = {f"blocks.{i}.adapter.weight": torch.zeros(2) for i in range(2)}
    save_file(official_tensors(MODELS["t2v"]) | extra, path)
    refused(path, "2 tensors (blocks.0.adapter.weight, blocks.1.adapter.weight) not known", "choose a Wan 2.1/2.2")


def test_shapes_that_contradict_each_other(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = official_tensors(MODELS["t2v"])
    save_file(tensors | {"blocks.1.ffn.0.weight": torch.zeros(80, 256)}, path)
    refused(path, "blocks.1.ffn.0.weight is [80, 256]; expected [96, 256]", "download it again")
    save_file(tensors | {"patch_embedding.weight": torch.zeros(256, 62)}, path)
    refused(path, "patch_embedding.weight has shape [256, 62]; expected 5 dimensions", "choose another file")


def test_two_layouts_in_one_file(tmp_path):
    path = write_layout(tmp_path, "diffusers", MODELS["t2v"])
    save_file(load_file(path) | {"blocks.0.self_attn.q.weight": torch.zeros(256, 256)}, path)
    refused(path, "blocks.0.attn1.to_q.weight", "two layouts", "download the model again")


def test_a_scaled_file_is_not_loaded_as_a_plain_one(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = official_tensors(MODELS["t2v"])
    scale = {"blocks.0.ffn.0.scale_weight": torch.tensor(2.0), "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    save_file(tensors | scale, path)
    layer = load_wan(path).blocks[0].ffn[0]
    torch.testing.assert_close(
        layer.format.dequantize(layer.packed(), torch.float32), 2 * tensors["blocks.0.ffn.0.weight"]
    )
    of_a_norm = {"blocks.0.norm3.scale_weight": torch.tensor(2.0)}  # which is unpacked as it is read
    save_file(tensors | of_a_norm, path)
    torch.testing.assert_close(load_wan(path).blocks[0].norm3.weight.data, 2 * tensors["blocks.0.norm3.weight"])
    stray = {"blocks.0.norm7.scale_weight": torch.tensor(2.0)}  # of a weight that is not there
    save_file(tensors | stray, path)
    refused(path, "quantised file", "choose the bf16")


WRONG_FILES = {
    "a LoRA": (["diffusion_model.blocks.0.self_attn.q.lora_A.weight", "x.lora_B.weight"], "as a LoRA"),
    "a LoRA ": (["lora_unet_blocks_0_ffn_0.lora_down.weight", "lora_unet_blocks_0_ffn_0.alpha"], "as a LoRA"),
    "a LoRA (full differences)": (["diffusion_model.blocks.0.self_attn.norm_q.diff"], "as a LoRA"),
    "a FramePack transformer": (
        ["clean_x_embedder.proj_4x.weight", "transformer_blocks.0.attn.to_q.weight"],
        "FramePack loader",
    ),
    "a Wan VAE": (["decoder.middle.0.residual.0.gamma", "conv2.weight", "encoder.conv1.weight"], "as the VAE"),
    "a Wan VAE (diffusers layout)": (["decoder.mid_block.resnets.0.norm1.gamma", "quant_conv.weight"], "as the VAE"),
    "a UMT5 text encoder": (
        ["shared.weight", *(f"encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight" for i in (0, 1))],
        "as the text encoder",
    ),
    "a UMT5 text encoder ": (["token_embedding.weight", "blocks.0.pos_embedding.embedding.weight"], "as the text"),
    "a CLIP vision model": (["vision_model.encoder.layers.0.self_attn.q_proj.weight"], "as the CLIP vision model"),
    "a CLIP vision model ": (["visual.transformer.0.attn.to_qkv.weight"], "as the CLIP vision model"),
    "a T5 text encoder": (
        ["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "shared.weight"],
        "choose a Wan transformer",
    ),
    "a Flux transformer": (["double_blocks.0.img_mod.lin.weight", "single_blocks.0.linear1.weight"], "choose a Wan"),
    "a Stable Diffusion checkpoint": (
        ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight"],
        "choose a Wan transformer",
    ),
    "a Stable Diffusion 3 transformer": (["joint_blocks.0.x_block.attn.proj.weight"], "choose a Wan transformer"),
    "no known model (1 tensor (some.weight))": (["some.weight"], "choose a Wan transformer"),
}


@pytest.mark.parametrize("title", WRONG_FILES)
def test_the_wrong_file_for_the_slot_is_named(tmp_path, title):
    names, advice = WRONG_FILES[title]
    path = write_names(tmp_path / "wrong.safetensors", names)
    refused(path, f"this is {title.strip()}", "Wan 2.1 or 2.2 transformer", advice)


def test_real_foreign_models_are_recognised():
    """Names as diffusers and transformers write them, not as this test remembers them."""
    from diffusers import AutoencoderKL, AutoencoderKLWan, FluxTransformer2DModel, UNet2DConditionModel
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, UMT5Config, UMT5EncoderModel

    with torch.device("meta"):
        models = {
            "a Wan VAE (diffusers layout)": AutoencoderKLWan(base_dim=4, z_dim=2),
            "a Flux transformer (diffusers)": FluxTransformer2DModel(num_layers=1, num_single_layers=1),
            "a Stable Diffusion UNet": UNet2DConditionModel(),
            "an image VAE, not Wan's": AutoencoderKL(),
            "a UMT5 text encoder": UMT5EncoderModel(UMT5Config(num_layers=2, d_model=8, vocab_size=9)),
            "a CLIP vision model": CLIPVisionModelWithProjection(CLIPVisionConfig(num_hidden_layers=1)),
        }
    for title, model in models.items():
        names = list(model.state_dict())
        if title == "a CLIP vision model":  # files keep the submodule's name, whichever release wrote them
            names = ["vision_model." + name.removeprefix("vision_model.") for name in names]
        assert file_kind(names).title == title


def test_identity_of_other_files():
    vae = identify(fake_checkpoint({"decoder.middle.0.residual.0.gamma": (9,), "conv2.weight": (16, 16, 1, 1, 1),
                                    "decoder.conv1.weight": (384, 16, 3, 3, 3)}))  # fmt: skip
    assert (vae.kind, vae.title) == ("wan vae", "Wan 2.1 VAE")
    assert "16 latent channels" in describe(vae)
    lora = identify(fake_checkpoint({"blocks.0.ffn.0.lora_A.weight": (32, 64)}))
    assert (lora.kind, lora.config, lora.num_blocks) == ("lora", "rank 32", 1)
    assert identify(fake_checkpoint({})).kind == "unknown"


def test_identity_counts_dtypes_per_part_and_bytes_per_block():
    checkpoint = fake_checkpoint(shapes_of(MODELS["flf2v"]))
    name = "blocks.1.ffn.2.weight"
    half = replace(checkpoint.tensors[name], dtype=torch.float8_e4m3fn, nbytes=checkpoint.tensors[name].nbytes // 2)
    identity = identify(Checkpoint(checkpoint.path, {**checkpoint.tensors, name: half}, {}))
    assert sum(part.num_bytes for part in identity.parts) == identity.total_bytes
    fp8 = [part for part in identity.parts if part.dtype == "float8_e4m3fn"]
    assert [(part.part, part.num_tensors, part.num_bytes) for part in fp8] == [("blocks", 1, half.nbytes)]
    assert {part.part for part in identity.parts} == {"embeddings", "blocks", "head"}
    least, most = identity.block_bytes
    assert most - least == half.nbytes
    text = describe(identity)
    assert "float8_e4m3fn" in text and "CLIP ViT-H" in text and "Wan 2.1 FLF2V" in text


# --- memory ----------------------------------------------------------------------------------------------

MEASURE = """
import sys, threading, time
import psutil
from lowvram_video.wanvideo.checkpoint import build_wan, open_wan
from lowvram_video.weights.linear.adopt import load_tensors

process = psutil.Process()
start = peak = process.memory_info().rss
done = False

def watch():
    global peak
    while not done:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
config, checkpoint = open_wan(sys.argv[1])
model = load_tensors(build_wan(config, checkpoint), checkpoint)
done = True
watcher.join()
kept = sum(parameter.nbytes for parameter in model.parameters())
print(start, max(peak, process.memory_info().rss), kept)
"""


def test_loading_peaks_at_the_size_of_the_file(tmp_path):
    config = WanConfig("t2v", dim=1024, ffn_dim=8192, num_heads=8, num_layers=8)
    path = tmp_path / "large.safetensors"
    header, offset = {}, 0
    for name, info in fake_checkpoint(shapes_of(config)).tensors.items():
        header[name] = {"dtype": "BF16", "shape": info.shape, "data_offsets": [offset, offset + info.nbytes]}
        offset += info.nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)  # zeros, which cost memory all the same once they are read
    size = path.stat().st_size
    run = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    start, peak, kept = (int(number) for number in run.stdout.split())
    mib = 2**20
    print(
        f"file {size / mib:.0f} MiB: peak RSS {peak / mib:.0f} MiB, {(peak - start) / mib:.0f} MiB above the process "
        f"before loading ({start / mib:.0f} MiB with torch)"
    )
    assert size > 400e6 and kept == offset
    assert peak - start >= offset * 0.95  # the measurement sees the weights at all
    assert peak <= size + 300e6
