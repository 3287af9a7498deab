"""Tiny models for tests/layout_rows.py: their numbers, what we make of a file, and what another program does."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import sentencepiece
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from lowvram_video.framepack.checkpoint import build_framepack, open_framepack
from lowvram_video.framepack.text.checkpoint import open_clip, open_llama, open_siglip
from lowvram_video.framepack.text.images import ImageEncoder
from lowvram_video.framepack.vae.checkpoint import HUNYUAN_FORMAT
from lowvram_video.framepack.vae.model import VAEConfig as HunyuanConfig
from lowvram_video.wanvideo.checkpoint import build_wan, open_wan
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.network.model import Extras
from lowvram_video.wanvideo.text.checkpoint import load_text_encoder
from lowvram_video.wanvideo.vae.checkpoint import WAN_FORMAT
from lowvram_video.wanvideo.vae.model import WAN21_VAE, WAN22_VAE
from lowvram_video.wanvideo.vae.model import VAEConfig as WanVaeConfig
from lowvram_video.weights.linear.adopt import load_tensors
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

from .test_framepack_model import Frames as HistoryFrames
from .test_framepack_model import Inputs, reference_of, run_ours, run_reference
from .tiny_framepack import WIDE as FRAMEPACK

Tensors = dict[str, Tensor]
CPU = torch.device("cpu")
WAN = WanConfig("t2v", dim=256, ffn_dim=512, num_heads=2, num_layers=2, text_dim=32, freq_dim=32)
WANS = {
    "t2v": WAN,
    "i2v": replace(WAN, model_type="i2v", in_channels=36, image_dim=1280),
    "i2v 2.2": replace(WAN, model_type="i2v", in_channels=36),
    "ti2v": replace(WAN, model_type="ti2v", in_channels=48, out_channels=48),
    "vace": replace(WAN, model_type="vace", num_layers=4, vace_layers=2, vace_channels=96),
}
WAN_VAE = replace(WAN21_VAE, encoder_dim=8, decoder_dim=8)
WAN22_SMALL = replace(WAN22_VAE, encoder_dim=8, decoder_dim=8)
HUNYUAN_VAE = HunyuanConfig(block_out_channels=(8, 16, 32, 32), layers_per_block=1, num_groups=8)
PROMPT = "a red ball moves left"


@dataclass(frozen=True)
class Model:
    """`reference` is another program's model with random weights, `run` what it makes of a fixed input, `load` what we
    make of it with the weights of a file; `names` turns the reference's names into those that files have."""

    reference: Callable[[], nn.Module]
    run: Callable[[nn.Module], Tensor]
    load: Callable[[Path], Tensor]
    is_linear: Callable[[str], bool]
    names: Callable[[str], str] = str


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spread(model: nn.Module) -> nn.Module:
    """Random weights of a scale that keeps activations near one, norms near one."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        is_norm = name.endswith("gamma") or ("norm" in name and name.endswith("weight") and parameter.ndim == 1)
        is_table = name.endswith(("shared.weight", "embed_tokens.weight", "token_embedding.weight"))
        scale = 0.7 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 and not is_norm else 0.1
        parameter.data = 1 + 0.1 * values if is_norm else values * (1.0 if is_table else scale)
    return model.eval().requires_grad_(False)


# --- Wan -------------------------------------------------------------------------------------------------


def wan_reference(kind: str) -> nn.Module:
    config = WANS[kind]
    shared = dict(
        num_attention_heads=config.num_heads, attention_head_dim=128, in_channels=config.in_channels,
        out_channels=config.out_channels, text_dim=config.text_dim, freq_dim=config.freq_dim, ffn_dim=config.ffn_dim,
        num_layers=config.num_layers, image_dim=config.image_dim or None,
        added_kv_proj_dim=config.dim if config.image_dim else None,
    )  # fmt: skip
    if config.vace_layers:
        return spread(WanVACETransformer3DModel(**shared, vace_layers=[0, 2], vace_in_channels=96))
    return spread(WanTransformer3DModel(**shared))


def wan_inputs(kind: str) -> dict[str, Tensor]:
    config = WANS[kind]
    given = {
        "hidden_states": rand(1, 1, config.in_channels, 2, 4, 6),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": rand(2, 1, 512, config.text_dim),
    }
    if config.image_dim:
        given["encoder_hidden_states_image"] = rand(3, 1, 257, config.image_dim)
    if config.vace_layers:
        given |= {"control_hidden_states": rand(4, 1, 96, 2, 4, 6), "control_hidden_states_scale": torch.ones(2)}
    return given


@torch.inference_mode()
def run_wan(kind: str, model: nn.Module) -> Tensor:
    return model(**wan_inputs(kind), return_dict=False)[0]


@torch.inference_mode()
def load_wan(kind: str, path: Path, vace_module: Path | None = None) -> Tensor:
    given = wan_inputs(kind)
    config, checkpoint = open_wan(path, vace_module)
    model = load_tensors(build_wan(config, checkpoint), checkpoint)
    extras = Extras()
    if "control_hidden_states" in given:
        extras = Extras(vace_frames=(given["control_hidden_states"],), vace_strengths=(1.0,))
    latent, time, text, image = (
        given.get(name)
        for name in ("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image")
    )
    return model(latent, time, text, image, extras=extras)


@cache
def official_wan_names(kind: str) -> dict[str, str]:
    """diffusers' name -> the official one, by diffusers' own conversion."""
    from lowvram_video.wanvideo.network.model import WanModel  # only for which names there are

    official = WanModel(WANS[kind], device="meta").state_dict()
    return {next(iter(convert_wan_transformer_to_diffusers({name: torch.zeros(1)}))): name for name in official}


def wan_model(kind: str) -> Model:
    def is_linear(name: str) -> bool:
        return "blocks." in name and name.endswith(".weight") and "norm" not in name

    return Model(
        lambda: wan_reference(kind), lambda model: run_wan(kind, model), lambda path: load_wan(kind, path), is_linear,
        lambda name: official_wan_names(kind)[name],
    )  # fmt: skip


# --- FramePack -------------------------------------------------------------------------------------------


def framepack_inputs() -> Inputs:
    start, _, noisy, near, twice, four = torch.arange(26).split([1, 3, 3, 1, 2, 16])
    places = (noisy, torch.cat([start, near]), twice, four)
    parts = [HistoryFrames(rand(n, 1, 16, len(place), 10, 6), place) for n, place in enumerate(places)]
    sizes = FRAMEPACK.text_dim, FRAMEPACK.pooled_dim, FRAMEPACK.image_dim
    return Inputs(
        *parts, text=rand(5, 1, 9, sizes[0]), num_text=6, pooled=rand(6, 1, sizes[1]), image=rand(7, 1, 5, sizes[2])
    )


@torch.inference_mode()
def load_framepack(path: Path) -> Tensor:
    config, checkpoint = open_framepack(path)
    return run_ours(load_tensors(build_framepack(config, checkpoint), checkpoint), framepack_inputs(), 437.5)


FRAMEPACK_MODEL = Model(
    lambda: spread(reference_of(FRAMEPACK)),
    torch.inference_mode()(lambda model: run_reference(model, framepack_inputs(), 437.5)),
    load_framepack,
    lambda name: name.startswith(("transformer_blocks", "single_")) and name.endswith(".weight") and "norm" not in name,
)


# --- encoders --------------------------------------------------------------------------------------------


@cache
def spiece() -> bytes:
    written = io.BytesIO()
    captions = [PROMPT, "a blue square moves right", "two cats fight on a stage"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions * 20), model_writer=written, vocab_size=40, model_type="unigram",
        hard_vocab_limit=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3, minloglevel=2,
    )  # fmt: skip
    return written.getvalue()


def umt5_reference() -> nn.Module:
    config = UMT5Config(
        vocab_size=64, d_model=256, d_kv=64, d_ff=256, num_layers=2, num_heads=2, attn_implementation="eager"
    )
    return spread(UMT5EncoderModel(config))


@torch.inference_mode()
def run_umt5(model: nn.Module) -> Tensor:
    ids = sentencepiece.SentencePieceProcessor(model_proto=spiece()).encode(PROMPT)
    return model(torch.tensor([[*ids, 1]])).last_hidden_state


@torch.inference_mode()
def load_umt5(path: Path) -> Tensor:
    context = load_text_encoder(path, dtype=torch.float32).encode([PROMPT])
    return context[:, : int(context[0].any(-1).sum())]


LINEAR_OF_ENCODERS = ("SelfAttention.", "DenseReluDense.", "self_attn.", "mlp.")


def is_encoder_linear(name: str) -> bool:
    return any(part in name for part in LINEAR_OF_ENCODERS) and name.endswith(".weight") and "relative" not in name


def llama_reference() -> nn.Module:
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=128, rms_norm_eps=1e-5, rope_theta=500000.0, pad_token_id=None,
        attn_implementation="eager",
    )  # fmt: skip
    return spread(LlamaModel(config))


IDS = torch.arange(1, 41)[None]


@torch.inference_mode()
def load_llama(path: Path) -> Tensor:
    opened = open_llama(path)
    return load_tensors(opened.build(), opened.checkpoint)(opened.table.rows(IDS))


def clip_reference() -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=62, eos_token_id=63, attn_implementation="eager",
    )  # fmt: skip
    return spread(CLIPTextModel(config))


CLIP_IDS = torch.cat([torch.arange(62, 50, -1), torch.tensor([63])])[None]


@torch.inference_mode()
def load_clip(path: Path) -> Tensor:
    opened = open_clip(path)
    ends = torch.tensor([CLIP_IDS.shape[1] - 1])
    return load_tensors(opened.build(), opened.checkpoint)(opened.table.rows(CLIP_IDS), ends)


def siglip_reference() -> nn.Module:
    config = SiglipVisionConfig(
        hidden_size=144, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=384,
        patch_size=14, attn_implementation="eager",
    )  # fmt: skip
    return spread(SiglipVisionModel(config))


PICTURE = torch.rand(1, 3, 384, 384, generator=torch.Generator().manual_seed(0)).mul(255).round() / 127.5 - 1


def load_siglip(path: Path) -> Tensor:
    open_siglip(path)
    return ImageEncoder(path, CPU, torch.float32).encode(PICTURE)


# --- VAEs ------------------------------------------------------------------------------------------------


def wan_vae_model(config: WanVaeConfig) -> Model:
    latent = rand(8, 1, config.z_dim, 2, 4, 6)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latent_mean, config.latent_std))
    patch = config.patch_size

    def reference() -> nn.Module:
        return spread(
            AutoencoderKLWan(
                base_dim=config.encoder_dim, decoder_base_dim=config.decoder_dim, z_dim=config.z_dim,
                dim_mult=list(config.dim_mult), num_res_blocks=config.num_res_blocks,
                temperal_downsample=list(config.temporal_downsample), is_residual=config.residual_shortcuts,
                patch_size=patch if patch > 1 else None, in_channels=3 * patch**2, out_channels=3 * patch**2,
                scale_factor_spatial=config.spatial_stride,
            )
        )  # fmt: skip

    @torch.inference_mode()
    def run(model: nn.Module) -> Tensor:
        return model.decode(latent * std + mean, return_dict=False)[0]

    @torch.inference_mode()
    def load(path: Path) -> Tensor:
        vae = WAN_FORMAT.open_file(path).build(torch.float32, CPU)
        return torch.cat(list(vae.decode_pieces(latent)), dim=2).clamp(-1.0, 1.0)  # as diffusers does

    return Model(reference, run, load, lambda name: False)


def hunyuan_vae_reference() -> nn.Module:
    config = HUNYUAN_VAE
    vae = AutoencoderKLHunyuanVideo(
        block_out_channels=config.block_out_channels, layers_per_block=config.layers_per_block,
        norm_num_groups=config.num_groups, latent_channels=config.latent_channels,
        scaling_factor=config.scaling_factor,
    )  # fmt: skip
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return spread(vae)


HUNYUAN_LATENT = rand(9, 1, 16, 2, 4, 6)


@torch.inference_mode()
def load_hunyuan_vae(path: Path) -> Tensor:
    vae = HUNYUAN_FORMAT.open_file(path).build(torch.float32, CPU)
    return torch.cat(list(vae.decode_pieces(HUNYUAN_LATENT)), dim=2)


MODELS: dict[str, Model] = {
    **{kind: wan_model(kind) for kind in WANS},
    "framepack": FRAMEPACK_MODEL,
    "umt5": Model(umt5_reference, run_umt5, load_umt5, is_encoder_linear),
    "llama": Model(
        llama_reference,
        torch.inference_mode()(lambda model: model(IDS, output_hidden_states=True).hidden_states[-3]),
        load_llama,
        is_encoder_linear,
    ),
    "clip": Model(
        clip_reference,
        torch.inference_mode()(lambda model: model(CLIP_IDS).pooler_output),
        load_clip,
        is_encoder_linear,
    ),
    "siglip": Model(
        siglip_reference,
        torch.inference_mode()(lambda model: model(PICTURE).last_hidden_state),
        load_siglip,
        is_encoder_linear,
    ),
    "wan vae": wan_vae_model(WAN_VAE),
    "wan 2.2 vae": wan_vae_model(WAN22_SMALL),
    "hunyuan vae": Model(
        hunyuan_vae_reference,
        torch.inference_mode()(
            lambda model: model.decode(HUNYUAN_LATENT / model.config.scaling_factor, return_dict=False)[0]
        ),
        load_hunyuan_vae,
        lambda name: False,
    ),
}


@cache
def reference(model: str) -> nn.Module:
    return MODELS[model].reference()
