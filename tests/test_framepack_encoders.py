"""FramePack's prompt and picture encoders against transformers, tokenizers and diffusers, and their files."""

import copy
import json
import os
import random
import re
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoFramepackPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_framepack import DEFAULT_PROMPT_TEMPLATE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lowvram_video.framepack.inputs import EncoderFiles, Encoders, Inputs
from lowvram_video.framepack.text.bpe import LLAMA_SPLIT, BytePairTokenizer
from lowvram_video.framepack.text.checkpoint import open_clip, open_llama, open_siglip
from lowvram_video.framepack.text.images import ImageEncoder
from lowvram_video.framepack.text.llama_gguf import LAYER_NAMES, TOP_NAMES
from lowvram_video.framepack.text.prompts import AFTER_PROMPT, BEFORE_PROMPT, MAX_TOKENS, PromptEncoder
from lowvram_video.framepack.text.tokenizer_files import (
    CLIP_TOKENIZER,
    find_tokenizer,
    read_clip_vocab,
    read_tokenizer_json,
)
from lowvram_video.framepack.timed_prompts import parse_timed_prompt
from lowvram_video.runtime.settings import RunSettings
from lowvram_video.video.pictures import squeezed
from lowvram_video.weights.files.checkpoint import Checkpoint, CheckpointError
from lowvram_video.weights.linear.adopt import load_tensors
from lowvram_video.weights.linear.gguf import GGUF_FORMATS
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Regex, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as FastTokenizer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from .quantizers import quantize, write_gguf

CPU = torch.device("cpu")
CORPUS = [
    BEFORE_PROMPT.replace("<|", " ").replace("|>", " "),
    "The girl dances gracefully, with clear movements, full of charm. It's 2025; they're 12 o'clock!",
    "一个红色的球向左移动，电影般的光线。赤いボールが左に動く。カメラはゆっくり回る。",
    "A character doing some simple body movements.   The   camera\n\nturns around\n",
]
TEXTS = [
    "The girl dances gracefully, with clear movements, full of charm.",
    "",
    " ",
    "\n\n\nthree lines",
    "It's 12345 o'clock; I'M, we'LL, they'Re, 'S 'ſ don't",
    "一个红色的球向左移动，电影般的光线。色调艳丽，过曝，静态",
    "赤いボールが左に動く。カタカナ、ひらがな",
    "🚀🔥 emoji 👩‍👩‍👧‍👦 joined",
    "a  b   c    \n \n d\r\n\r\n\te\n",
    "ΣΑΣ İstanbul ß ẞ Ǆ ﬁ",
    "é e\u0301 Å \u212b",
    "½ ² Ⅻ ٣٤٥ १२३ 1,234.56 1000000",
    "separators \x1c\x1d \x85\xa0\u200b\u2028\u3000x",
    "markers <|eot_id|> <|start_header_id|>!<|startoftext|>!<|endoftext|> <|STARTOFTEXT|> <|none|>",
    "!!!'s ''s …—“quoted” (brackets) [2s: x] {}",
    "العربية עברית ไทย हिन्दी 한국어 Ελληνικά кириллица",
]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def spoiled(model: torch.nn.Module) -> torch.nn.Module:
    """Norms that are not ones, biases that are not zeros, layers that count beside the embeddings."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter += 0.2 * torch.randn_like(parameter)
        elif "embed" in name:
            parameter.normal_()
        else:
            parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    return model


def write(path: Path, tensors, prefix: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({prefix + name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    return path


# --- tiny stand-ins --------------------------------------------------------------------------------------

LLAMA_MARKS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<pad>"
]  # fmt: skip


def llama_tokenizer(whole_words: bool) -> FastTokenizer:
    fast = FastTokenizer(models.BPE(ignore_merges=whole_words))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    fast.train_from_iterator(CORPUS, trainer)
    fast.add_special_tokens(LLAMA_MARKS)
    bos = fast.token_to_id(LLAMA_MARKS[0])
    template = processors.TemplateProcessing(single=f"{LLAMA_MARKS[0]} $A", special_tokens=[(LLAMA_MARKS[0], bos)])
    fast.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return fast


@cache
def clip_vocab() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """As CLIP's: every byte, every byte at the end of a word, then what was merged; the trainer is not repeatable."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained = FastTokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(vocab_size=500, end_of_word_suffix="</w>", show_progress=False)
    trained.train_from_iterator([text.lower() for text in CORPUS], trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    words = [*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"]
    return {word: number for number, word in enumerate(words)}, merges


@pytest.fixture(scope="module")
def fast_llama() -> FastTokenizer:
    return llama_tokenizer(whole_words=True)


@pytest.fixture(scope="module")
def fast_clip() -> CLIPTokenizer:
    vocab, merges = clip_vocab()
    return CLIPTokenizer(vocab=vocab, merges=merges)


@pytest.fixture(scope="module")
def llama(fast_llama) -> LlamaModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=fast_llama.get_vocab_size() + 3,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        pad_token_id=None,
        attn_implementation="eager",
    )
    return spoiled(LlamaModel(config).eval().requires_grad_(False))


@pytest.fixture(scope="module")
def clip(fast_clip) -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(fast_clip),
        hidden_size=128,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=2,
        bos_token_id=fast_clip.bos_token_id,
        eos_token_id=fast_clip.eos_token_id,
        attn_implementation="eager",
    )
    return spoiled(CLIPTextModel(config).eval().requires_grad_(False))


@pytest.fixture(scope="module")
def siglip() -> SiglipVisionModel:
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=144,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=384,
        patch_size=14,
        attn_implementation="eager",
    )
    return spoiled(SiglipVisionModel(config).eval().requires_grad_(False))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, llama, clip, siglip, fast_llama, fast_clip) -> Path:
    """As ComfyUI's users have it: encoders in one folder, tokenizers in folders there."""
    folder = tmp_path_factory.mktemp("text_encoders")
    write(folder / "llava_llama3.safetensors", llama.state_dict(), "model.")
    write(folder / "clip_l.safetensors", clip.state_dict(), "text_model.")
    write(folder / "sigclip.safetensors", siglip.state_dict(), "vision_model.")
    write_tokenizers(folder, fast_llama, fast_clip)
    return folder


def write_tokenizers(folder: Path, fast_llama: FastTokenizer, fast_clip: CLIPTokenizer) -> None:
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    fast_llama.save(str(folder / "tokenizer" / "tokenizer.json"))
    fast_clip.backend_tokenizer.save(str(folder / "tokenizer_2" / "tokenizer.json"))


def write_clip_pair(folder: Path) -> None:
    vocab, merges = clip_vocab()
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


def open_encoder(folder: Path, dtype: torch.dtype = torch.float32, tokenizers: Path | None = None) -> PromptEncoder:
    return PromptEncoder(folder / "llava_llama3.safetensors", folder / "clip_l.safetensors", tokenizers, CPU, dtype)


@pytest.fixture
def encoder(folder) -> PromptEncoder:
    return open_encoder(folder)


# --- models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 40, 351])
def test_llama_matches_transformers(encoder, llama, length):
    torch.manual_seed(length)
    ids = torch.randint(0, llama.config.vocab_size, (2, length))
    with torch.inference_mode():
        expected = llama(ids, output_hidden_states=True).hidden_states[-3]
        actual = encoder._decoder(encoder._llama.table.rows(ids))
    error = relative_error(actual, expected)
    print(f"LLaMA, {length} tokens: max relative error {error:.2e}")
    assert error <= 1e-5


def test_clip_matches_transformers(folder, clip):
    opened = open_clip(folder / "clip_l.safetensors")
    model = load_tensors(opened.build(), opened.checkpoint)
    torch.manual_seed(0)
    ids = torch.randint(0, clip.config.eos_token_id, (3, 77))
    ends = torch.tensor([76, 30, 1])
    for row, end in enumerate(ends):
        ids[row, end] = clip.config.eos_token_id
    with torch.inference_mode():
        expected = clip(ids).pooler_output
        actual = model(opened.table.rows(ids), ends)
    error = relative_error(actual, expected)
    print(f"CLIP text, pooled: max relative error {error:.2e}")
    assert error <= 1e-5


def test_siglip_matches_transformers(folder, siglip):
    torch.manual_seed(0)
    picture = torch.rand(1, 3, 384, 384).mul(255).round() / 127.5 - 1
    with torch.inference_mode():
        expected = siglip(picture).last_hidden_state
    actual = ImageEncoder(folder / "sigclip.safetensors", CPU, torch.float32).encode(picture)
    assert actual.shape == (1, 729, 144)
    error = relative_error(actual, expected)
    print(f"SigLIP vision, last hidden state: max relative error {error:.2e}")
    assert error <= 1e-5


@pytest.mark.parametrize("size", [(608, 640), (96, 416), (1100, 300), (384, 384)])
def test_pictures_are_prepared_as_by_the_official_processor(size):
    rng = np.random.default_rng(0)
    rough = Image.fromarray(rng.integers(0, 256, (size[0] // 16, size[1] // 16, 3), dtype=np.uint8))
    image = rough.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    expected = SiglipImageProcessorPil(size={"height": 384, "width": 384}, resample=Image.Resampling.BICUBIC)(
        images=image, return_tensors="pt"
    )["pixel_values"]
    picture = torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    levels = (squeezed(picture, 384) - expected).abs() * 127.5
    print(f"picture of {size}: at most {float(levels.max()):.3f} of 255 levels, {float(levels.mean()):.4f} on average")
    assert float(levels.max()) < 1.01  # Pillow rounds between its two passes too

    # ComfyUI's formula, CLIPVisionEncode without crop.
    halves = (picture + 1) / 2
    if size != (384, 384):
        halves = torch.nn.functional.interpolate(halves, (384, 384), mode="bicubic", antialias=True)
    comfyui = (torch.clip(255.0 * halves, 0, 255).round() / 255.0 - 0.5) / 0.5
    differing = ((squeezed(picture, 384) - comfyui).abs() * 127.5 > 0.5).float().mean()
    assert float(differing) < 1e-3  # values half-way between two levels


# --- prompts ---------------------------------------------------------------------------------------------


def official(encoder, llama, clip, fast_llama, fast_clip):
    """What diffusers' own methods run on, without a pipeline."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast_llama, pad_token="<pad>", padding_side="right")
    return SimpleNamespace(tokenizer=tokenizer, text_encoder=llama, tokenizer_2=fast_clip, text_encoder_2=clip)


def test_the_template_is_the_official_one():
    assert f"{BEFORE_PROMPT}{{}}{AFTER_PROMPT}" == DEFAULT_PROMPT_TEMPLATE["template"]


def test_prompts_match_diffusers(encoder, llama, clip, fast_llama, fast_clip, caplog):
    texts = [*TEXTS, "word " * 400]
    pipeline = official(encoder, llama, clip, fast_llama, fast_clip)
    template = {**DEFAULT_PROMPT_TEMPLATE, "crop_start": len(fast_llama.encode(BEFORE_PROMPT).ids)}
    with torch.inference_mode():
        hidden, mask = HunyuanVideoFramepackPipeline._get_llama_prompt_embeds(
            pipeline, texts, template, device=CPU, max_sequence_length=MAX_TOKENS
        )
        pooled = [
            HunyuanVideoFramepackPipeline._get_clip_prompt_embeds(pipeline, text, device=CPU)[0] for text in texts
        ]
    prompts = encoder.encode(texts)
    errors = []
    for prompt, rows, kept, vector in zip(prompts, hidden, mask.bool(), pooled, strict=True):
        assert prompt.text.shape == (1, int(kept.sum()), 96)
        errors += [relative_error(prompt.text[0], rows[kept]), relative_error(prompt.pooled[0], vector)]
    print(f"{len(texts)} prompts against diffusers: max relative error {max(errors):.2e}")
    assert max(errors) <= 1e-5
    assert prompts[-1].text.shape[1] == MAX_TOKENS
    assert "the first 256 are read" in caplog.text


def test_a_prompt_does_not_depend_on_its_batch(encoder):
    together = encoder.encode(TEXTS[:4])
    for text, prompt in zip(TEXTS[:4], together, strict=True):
        alone = encoder.encode([text])[0]
        assert relative_error(prompt.text, alone.text) <= 1e-5
        assert relative_error(prompt.pooled, alone.pooled) <= 1e-5


def test_an_empty_prompt_is_its_end_token(encoder):
    (prompt,) = encoder.encode([""])
    assert prompt.text.shape == (1, 1, encoder.text_dim)
    assert prompt.pooled.shape == (1, encoder.pooled_dim)


@pytest.mark.parametrize("texts", ["a string", []])
def test_texts_must_be_a_list(encoder, texts):
    with pytest.raises(ValueError, match="expected a list of at least one string"):
        encoder.encode(texts)


@pytest.mark.parametrize("shape", [(3, 384, 384), (1, 3, 1, 384, 384), (2, 3, 8, 8), (1, 4, 8, 8)])
def test_a_picture_must_be_one(folder, shape):
    with pytest.raises(ValueError, match=r"expected one of shape \[1, 3, height, width\]"):
        ImageEncoder(folder / "sigclip.safetensors", CPU, torch.float32).encode(torch.zeros(shape))


# --- reading ---------------------------------------------------------------------------------------------


def test_layers_are_read_in_their_turn_and_dropped(encoder, monkeypatch):
    names, held = [], []
    read_into = Checkpoint.read_into

    def recording(self, name, out):
        names.append(name)
        layers = encoder._decoder.layers
        held.append(sum(any(not p.is_meta for p in layer.parameters()) for layer in layers))
        read_into(self, name, out)

    monkeypatch.setattr(Checkpoint, "read_into", recording)
    encoder.encode(TEXTS[:2])
    layers = sorted({name.split(".")[1] for name in names if name.startswith("layers.")})
    assert layers == ["0", "1", "2"]  # of five: the last two are never read
    assert "norm.weight" not in names
    assert "embed_tokens.weight" not in names  # its rows are, one by one
    assert max(held) <= 1  # and another that is being read
    assert all(parameter.is_meta for parameter in encoder._decoder.parameters())
    assert encoder.encode(TEXTS[:1])[0].text.isfinite().all()  # and again


def test_a_failing_layer_strands_nothing(encoder, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(encoder._decoder.layers[0].mlp), "forward", fail)
    with pytest.raises(RuntimeError):
        encoder.encode(["x"])
    assert all(parameter.is_meta for parameter in encoder._decoder.parameters())


def test_prompts_are_encoded_again_where_memory_was_lacking(folder, encoder, monkeypatch):
    files = EncoderFiles(folder / "llava_llama3.safetensors", folder / "clip_l.safetensors", folder / "no_vae")
    encoders = Encoders(files, RunSettings(device=CPU, dtype=torch.float32))
    mlp = type(encoder._decoder.layers[0].mlp)
    errors, forward = [RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")], mlp.forward

    def scarce(self, x):
        if errors:
            raise errors.pop()
        return forward(self, x)

    expected = encoder.encode(["a cat"])[0]
    monkeypatch.setattr(mlp, "forward", scarce)
    inputs = Inputs(parse_timed_prompt("a cat"), (64, 64))
    made = encoders.encode(inputs, SimpleNamespace(image_dim=8)).prompts["a cat"]
    assert torch.equal(made.text, expected.text) and not errors


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_stored_dtypes_compute_as_their_values(tmp_path, folder, llama, clip, stored):
    for suffix, dtype in (("cast", stored), ("values", torch.float32)):
        for name, model in (("llava_llama3", llama), ("clip_l", clip)):
            cast = {key: tensor.to(stored).to(dtype) for key, tensor in model.state_dict().items()}
            write(tmp_path / suffix / f"{name}.safetensors", cast)
    exact = open_encoder(tmp_path / "values", tokenizers=folder).encode(TEXTS[:3])
    for prompt, expected in zip(
        open_encoder(tmp_path / "cast", tokenizers=folder).encode(TEXTS[:3]), exact, strict=True
    ):
        assert relative_error(prompt.text, expected.text) <= 1e-6
        assert relative_error(prompt.pooled, expected.pooled) <= 1e-6


@pytest.mark.parametrize("names", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("rowwise", [False, True])
def test_scaled_fp8_is_its_dequantised_weights(tmp_path, folder, llama, names, rowwise):
    packed, values = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}, {}
    for name, tensor in llama.state_dict().items():
        values["model." + name] = tensor
        packed["model." + name] = tensor
        if tensor.ndim == 2:
            layer = "model." + name.removesuffix(".weight")
            largest = tensor.abs().amax(dim=1, keepdim=True) if rowwise else tensor.abs().max()
            scale = largest / torch.finfo(torch.float8_e4m3fn).max
            packed["model." + name] = (tensor / scale).to(torch.float8_e4m3fn)
            packed[f"{layer}.{names}"] = scale
            packed[f"{layer}.{'scale_input' if names == 'scale_weight' else 'input_scale'}"] = torch.tensor(1.0)
            values["model." + name] = packed["model." + name].float() * scale
    clip_path = folder / "clip_l.safetensors"
    paths = [
        write(tmp_path / "packed.safetensors", packed),
        write(tmp_path / "values.safetensors", values),
    ]
    scaled, exact = (PromptEncoder(path, clip_path, folder, CPU, torch.float32).encode(TEXTS[:3]) for path in paths)
    error = max(relative_error(a.text, b.text) for a, b in zip(scaled, exact, strict=True))
    print(f"scaled fp8 LLaMA: max relative error {error:.2e}")
    assert error <= 1e-6


def test_half_precision_is_closer_than_transformers(folder, encoder, llama):
    torch.manual_seed(0)
    ids = torch.randint(0, llama.config.vocab_size, (2, 120))
    with torch.inference_mode():
        exact = llama(ids, output_hidden_states=True).hidden_states[-3]
        theirs = copy.deepcopy(llama).bfloat16()(ids, output_hidden_states=True).hidden_states[-3]
        ours = encoder._decoder(encoder._llama.table.rows(ids), torch.bfloat16)
    errors = relative_error(ours, exact), relative_error(theirs.float(), exact)
    print(f"LLaMA in bfloat16: max relative error {errors[0]:.2e}; transformers' {errors[1]:.2e}")
    assert errors[0] <= errors[1]
    (prompt,), (expected,) = open_encoder(folder, torch.bfloat16).encode(TEXTS[:1]), encoder.encode(TEXTS[:1])
    assert prompt.text.dtype == prompt.pooled.dtype == torch.float32
    assert relative_error(prompt.pooled, expected.pooled) <= 3e-2  # bfloat16 has 8 bits of mantissa


# --- GGUF ------------------------------------------------------------------------------------------------


def write_llama_gguf(path: Path, llama: LlamaModel, fast: FastTokenizer, quant: str, **changes: object) -> Path:
    """As llama.cpp's converter does: rotated pairs made neighbours, and the tokenizer in the metadata."""
    tensors = {"output.weight": (torch.ones(4, 32), "F32"), "output_norm.weight": (torch.ones(96), "F32")}
    theirs = {ours: name for name, ours in {**LAYER_NAMES, **TOP_NAMES}.items()}
    for name, tensor in llama.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer == "norm":
            continue
        number, inner = (layer.split(".", 2)[1:]) if layer.startswith("layers.") else (None, layer)
        stem = theirs[inner] if number is None else f"blk.{number}.{theirs[inner]}"
        if inner in ("self_attn.q_proj", "self_attn.k_proj"):
            tensor = tensor.unflatten(0, (-1, 2, 64)).transpose(1, 2).flatten(0, 2)
        tensors[f"{stem}.weight"] = (tensor, quant if tensor.ndim == 2 else "F32")
    content = json.loads(fast.to_str())
    words = [word for word, _ in sorted(fast.get_vocab().items(), key=lambda item: item[1])]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [3 if word in LLAMA_MARKS else 1 for word in words],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in content["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": fast.token_to_id(LLAMA_MARKS[0]),
        **changes,
    }
    return write_gguf(path, tensors, "llama", fields)


@pytest.mark.parametrize("quant", ["F16", "Q8_0"])
def test_gguf_is_its_unpacked_weights(tmp_path, folder, llama, fast_llama, quant):
    path = write_llama_gguf(tmp_path / "llama.gguf", llama, fast_llama, quant)
    values = {}
    for name, tensor in llama.state_dict().items():
        rounded = tensor.half().float()
        if quant == "Q8_0":
            rounded = GGUF_FORMATS[quant].dequantize({"weight": quantize(tensor, quant)}, torch.float32)
        values[name] = rounded if tensor.ndim == 2 else tensor
    exact = write(tmp_path / "values.safetensors", values)
    (tmp_path / "clip_l.safetensors").write_bytes((folder / "clip_l.safetensors").read_bytes())
    shutil.copytree(folder / "tokenizer_2", tmp_path / "tokenizer_2")
    with_own_tokenizer = PromptEncoder(path, tmp_path / "clip_l.safetensors", None, CPU, torch.float32)
    packed = with_own_tokenizer.encode(TEXTS)
    plain = PromptEncoder(exact, folder / "clip_l.safetensors", folder, CPU, torch.float32).encode(TEXTS)
    error = max(relative_error(a.text, b.text) for a, b in zip(packed, plain, strict=True))
    print(f"LLaMA in {quant}: max relative error {error:.2e}")
    assert error <= 1e-5


def test_a_gguf_of_another_model_is_refused(tmp_path, folder, llama, fast_llama):
    other = {"tokenizer.ggml.pre": "qwen2"}
    path = write_llama_gguf(tmp_path / "qwen.gguf", llama, fast_llama, "F16", **other)
    with pytest.raises(CheckpointError, match="its tokenizer is of kind 'gpt2', 'qwen2'; expected 'gpt2', 'llama-bpe'"):
        PromptEncoder(path, folder / "clip_l.safetensors", None, CPU, torch.float32)


# --- files -----------------------------------------------------------------------------------------------


def test_layouts_load_identically(tmp_path, folder, encoder, llama, clip):
    expected = encoder.encode(TEXTS[:2])
    vision = {
        "vision_tower.vision_model.embeddings.class_embedding": torch.ones(4),
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": torch.ones(4, 4),
    }
    whole = {f"language_model.model.{name}": tensor for name, tensor in llama.state_dict().items()}
    inverse = {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(64)}
    for title, tensors in {
        "bare": llama.state_dict(),
        "with a head": {**{f"model.{k}": v for k, v in llama.state_dict().items()}, "lm_head.weight": torch.ones(2, 2)},
        "whole LLaVA": {**vision, **whole, "multi_modal_projector.linear_1.weight": torch.ones(2, 2)},
        "old buffers": {**llama.state_dict(), **inverse},
        "one checkpoint": {f"text_encoders.llama.transformer.model.{k}": v for k, v in llama.state_dict().items()},
    }.items():
        write(tmp_path / title / "llava_llama3.safetensors", tensors)
        buffer = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
        others = {"text_projection.weight": torch.ones(128, 128), "logit_scale": torch.tensor(1.0), **buffer}
        names = {f"text_model.{name}": tensor for name, tensor in clip.state_dict().items()}
        write(tmp_path / title / "clip_l.safetensors", {**names, **others})
        for prompt, wanted in zip(
            open_encoder(tmp_path / title, tokenizers=folder).encode(TEXTS[:2]), expected, strict=True
        ):
            assert torch.equal(prompt.text, wanted.text), title
            assert torch.equal(prompt.pooled, wanted.pooled), title


def test_a_release_in_folders_with_shards(tmp_path, encoder, llama, clip, fast_llama, fast_clip):
    llama.save_pretrained(tmp_path / "text_encoder", max_shard_size="300KB")
    assert len(list((tmp_path / "text_encoder").glob("*.safetensors"))) > 2
    clip.save_pretrained(tmp_path / "text_encoder_2")
    write_tokenizers(tmp_path, fast_llama, fast_clip)
    release = PromptEncoder(tmp_path / "text_encoder", tmp_path / "text_encoder_2", None, CPU, torch.float32)
    for prompt, wanted in zip(release.encode(TEXTS), encoder.encode(TEXTS), strict=True):
        assert torch.equal(prompt.text, wanted.text)
        assert torch.equal(prompt.pooled, wanted.pooled)


def test_dimensions_come_from_shapes(folder):
    config = open_llama(folder / "llava_llama3.safetensors").config
    assert (config.dim, config.ffn_dim, config.num_heads, config.num_kv_heads, config.num_layers) == (96, 64, 4, 2, 3)
    config = open_clip(folder / "clip_l.safetensors").config
    assert (config.dim, config.ffn_dim, config.num_heads, config.num_layers, config.num_positions) == (
        128, 80, 2, 3, 77,
    )  # fmt: skip
    config = open_siglip(folder / "sigclip.safetensors").config
    assert (config.dim, config.ffn_dim, config.num_heads, config.num_layers, config.num_tokens) == (144, 80, 2, 2, 729)


@pytest.mark.parametrize(
    ("opener", "name", "words"),
    [
        (
            open_llama,
            "clip_l",
            "this is a CLIP text encoder; expected a LLaMA 3 text encoder; choose llava_llama3_fp16",
        ),
        (open_clip, "llava_llama3", r"this is a LLaMA text encoder; expected a CLIP-L text encoder; choose clip_l\."),
        (open_siglip, "clip_l", "this is a CLIP text encoder; expected a SigLIP vision model; choose sigclip_vision"),
        (open_clip, "sigclip", "this is a SigLIP vision model; expected a CLIP-L text encoder"),
    ],
)
def test_other_models_are_named(folder, opener, name, words):
    with pytest.raises(CheckpointError, match=words):
        opener(folder / f"{name}.safetensors")


def test_clip_vision_is_no_siglip(tmp_path, siglip):
    tensors = {f"vision_model.{name}": tensor for name, tensor in siglip.state_dict().items() if "head" not in name}
    tensors["vision_model.embeddings.class_embedding"] = torch.ones(144)
    with pytest.raises(CheckpointError, match="this is a CLIP vision model; expected a SigLIP"):
        open_siglip(write(tmp_path / "clip_vision.safetensors", tensors))


def test_unfit_files_say_why(tmp_path, folder, llama, siglip):
    def refused(words, path, tensors, build):
        with pytest.raises(CheckpointError, match=words):
            build(write(tmp_path / path, tensors))

    def text(path):
        return PromptEncoder(path, folder / "clip_l.safetensors", folder, CPU, torch.float32)

    tensors = llama.state_dict()
    some = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up" not in name}
    refused(r"lacks 1 tensor \(layers.1.mlp.up_proj.weight\) of a LLaMA 3", "a.safetensors", some, text)
    biased = {**tensors, "layers.0.self_attn.q_proj.bias": torch.ones(512)}
    refused("another variant: choose llava_llama3_fp16", "b.safetensors", biased, text)
    few = {
        name: tensor for name, tensor in tensors.items() if not name.startswith(("layers.2", "layers.3", "layers.4"))
    }
    refused("of 2 layers; expected 32", "c.safetensors", few, text)
    small = {**tensors, "embed_tokens.weight": tensors["embed_tokens.weight"][:50]}
    refused("has 50 token embeddings and a tokenizer with ids up to", "d.safetensors", small, text)
    pictures = {f"vision_model.{name}": tensor for name, tensor in siglip.state_dict().items()}
    pictures["vision_model.embeddings.position_embedding.weight"] = torch.ones(1024, 144)
    refused("of 1024 patches of 14 pixels; expected 729", "e.safetensors", pictures, open_siglip)


# --- tokenizers ------------------------------------------------------------------------------------------

ALPHABET = [
    *"aAzZsStTmMdDlLvVrRe'''  \n\r\t09!.,-_<>|/()[]{}",
    *"ſKéßİΣς一二的は日本カ🚀👩ﬁहिไ٣Ⅻ½\u200d\u0301\u1680\u2028\u3000\xa0\x85\x1c\x0b",
]


def many_texts() -> list[str]:
    rng = random.Random(0)
    return TEXTS + CORPUS + ["".join(rng.choices(ALPHABET, k=rng.randrange(1, 40))) for _ in range(3000)]


@pytest.mark.parametrize("whole_words", [True, False])
def test_llama_tokenizer_matches_tokenizers(tmp_path, whole_words):
    reference = llama_tokenizer(whole_words)
    reference.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer_json(tmp_path / "tokenizer.json")
    texts = many_texts()
    for text in texts:
        assert tokenizer.encode(text) == reference.encode(text).ids, repr(text)
    print(f"LLaMA's tokenizer: {len(texts)} texts identical")


def test_older_files_write_merges_as_text(tmp_path, fast_llama):
    content = json.loads(fast_llama.to_str())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    tokenizer = read_tokenizer_json(tmp_path / "tokenizer.json")
    assert all(tokenizer.encode(text) == fast_llama.encode(text).ids for text in TEXTS)


def test_clip_tokenizer_matches_tokenizers(tmp_path, fast_clip):
    fast_clip.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_clip_pair(tmp_path)
    tokenizers = read_tokenizer_json(tmp_path / "tokenizer.json"), read_clip_vocab(tmp_path / "vocab.json")
    texts = many_texts()
    for text in texts:
        expected = fast_clip(text, truncation=True, max_length=77).input_ids
        assert tokenizers[0].encode(text, 77) == expected, repr(text)
        if "<|STARTOFTEXT|>" not in text:  # whether it counts in capitals is said in another file of the release
            assert tokenizers[1].encode(text, 77) == expected, repr(text)
    print(f"CLIP's tokenizer: {len(texts)} texts identical from both kinds of file")


def test_the_real_tokenizers():
    comfyui = Path(os.environ.get("COMFYUI_DIR", Path.home() / "ComfyUI")) / "comfy"
    vocab = comfyui / "sd1_tokenizer" / "vocab.json"
    if not vocab.is_file():
        pytest.skip("no ComfyUI here: set COMFYUI_DIR")
    reference, tokenizer = CLIPTokenizer.from_pretrained(vocab.parent), read_clip_vocab(vocab)
    for text in many_texts():
        assert tokenizer.encode(text) == reference(text).input_ids, repr(text)
    llama = comfyui / "text_encoders" / "llama_tokenizer" / "tokenizer.json"
    if not llama.is_file():
        pytest.skip(f"{llama} is absent")
    fast, tokenizer = FastTokenizer.from_file(str(llama)), read_tokenizer_json(llama)
    assert len(tokenizer.encode(BEFORE_PROMPT)) == DEFAULT_PROMPT_TEMPLATE["crop_start"]
    for text in many_texts():
        assert tokenizer.encode(text) == fast.encode(text).ids, repr(text)


def test_a_long_word_takes_no_quadratic_time(tmp_path, fast_llama):
    fast_llama.save(str(tmp_path / "tokenizer.json"))
    word = "的" * 20000
    assert read_tokenizer_json(tmp_path / "tokenizer.json").encode(word) == fast_llama.encode(word).ids


@pytest.mark.parametrize("pattern", [r"\w+", r"[[:alpha:]]+", r"[^\S]", r"\p{Greek}", r"(a"])
def test_unknown_patterns_are_refused(tmp_path, fast_llama, pattern):
    content = json.loads(fast_llama.to_str())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=f"its split pattern is {re.escape(repr(pattern))}; expected"):
        read_tokenizer_json(tmp_path / "tokenizer.json")


@pytest.fixture(scope="module")
def tokenizers(folder, tmp_path_factory) -> dict[str, BytePairTokenizer]:
    """Ours, from each kind of file."""
    pair = tmp_path_factory.mktemp("pair") / "vocab.json"
    write_clip_pair(pair.parent)
    return {
        "llama": read_tokenizer_json(folder / "tokenizer" / "tokenizer.json"),
        "clip": read_tokenizer_json(folder / "tokenizer_2" / "tokenizer.json"),
        "pair": read_clip_vocab(pair),
    }


SPICED = st.lists(
    st.text(max_size=12) | st.sampled_from([*LLAMA_MARKS, "<|startoftext|>", "<|endoftext|>", "'LL", "\r\n"])
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SPICED.map("".join))
def test_any_text_has_the_ids_of_transformers(tokenizers, fast_llama, fast_clip, text):
    whole = text.encode("utf-8", "replace").decode()
    llama = PreTrainedTokenizerFast(tokenizer_object=fast_llama)
    assert tokenizers["llama"].encode(text) == llama(whole).input_ids
    clip = fast_clip(whole, truncation=True, max_length=77).input_ids
    assert tokenizers["clip"].encode(text, 77) == clip
    if "<|startoftext|>" not in text.lower():
        assert tokenizers["pair"].encode(text, 77) == clip


def test_lone_surrogates_are_question_marks(tokenizers):
    for tokenizer in tokenizers.values():
        assert tokenizer.encode("a\ud800b") == tokenizer.encode("a?b")


def broken(content: dict, path: str, value: object) -> dict:
    """A copy with the value at a dotted path replaced."""
    content = copy.deepcopy(content)
    *folders, last = path.split(".")
    inner = content
    for name in folders:
        inner = inner[int(name) if isinstance(inner, list) else name]
    inner[int(last) if isinstance(inner, list) else last] = value
    return content


@pytest.mark.parametrize("value", [None, 3, -1, 2**40, "x", "", [], [[]], {}, {"a": []}, True, "\ud800"], ids=repr)
@pytest.mark.parametrize(
    "path",
    [
        "model", "model.vocab", "model.merges", "model.merges.0", "model.unk_token", "model.end_of_word_suffix",
        "model.dropout", "added_tokens", "added_tokens.0", "added_tokens.0.id", "added_tokens.0.content",
        "normalizer", "normalizer.normalizers", "normalizer.normalizers.1", "normalizer.normalizers.1.pattern",
        "pre_tokenizer", "pre_tokenizer.type", "pre_tokenizer.pretokenizers.0.pattern",
        "pre_tokenizer.pretokenizers.0.behavior", "post_processor", "post_processor.cls", "post_processor.sep.1",
    ],
)  # fmt: skip
def test_a_spoiled_tokenizer_is_read_or_refused_in_one_line(tmp_path, folder, fast_clip, path, value):
    content = broken(json.loads(fast_clip.backend_tokenizer.to_str()), path, value)
    write_spoiled(tmp_path, json.dumps(content))
    try:
        tokenizer = find_tokenizer(CLIP_TOKENIZER, tmp_path, folder / "clip_l.safetensors")
    except CheckpointError as error:
        assert str(tmp_path) in str(error) and "tokenizer" in str(error)
    else:
        assert tokenizer.encode("a red ball", 77)[-1] == tokenizer.last[0]


@pytest.mark.parametrize("text", ["[" * 200_000, "[]", "3", "null", "{", "", "\x00", '{"a": NaN}'])
@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, folder, name, text):
    write_spoiled(tmp_path, text, name)
    with pytest.raises(CheckpointError, match=r"cannot be read as a tokenizer: .*download vocab"):
        find_tokenizer(CLIP_TOKENIZER, tmp_path, folder / "clip_l.safetensors")


def write_spoiled(folder: Path, text: str, name: str = "tokenizer.json") -> None:
    (folder / "tokenizer_2").mkdir()
    (folder / "tokenizer_2" / name).write_text(text, encoding="utf-8")
    if name == "vocab.json":
        (folder / "tokenizer_2" / "merges.txt").write_text("#version: 0.2\na b\n", encoding="utf-8")


@pytest.mark.parametrize("merges", ["a", "a b c", "nowhere b", "\x00", "a  b"])
def test_spoiled_merges_are_refused(tmp_path, merges):
    write_clip_pair(tmp_path)
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="its parts do not fit together"):
        read_clip_vocab(tmp_path / "vocab.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer.ggml.merges": ["nowhere here"]},
        {"tokenizer.ggml.merges": [1, 2]},
        {"tokenizer.ggml.merges": "a b"},
        {"tokenizer.ggml.tokens": 3},
        {"tokenizer.ggml.tokens": [1, 2], "tokenizer.ggml.token_type": [1, 3]},
        {"tokenizer.ggml.token_type": "x"},
        {"tokenizer.ggml.bos_token_id": 2**31},
    ],
    ids=str,
)
def test_a_gguf_of_spoiled_tokens_is_refused(tmp_path, folder, llama, fast_llama, changes):
    path = write_llama_gguf(tmp_path / "llama.gguf", llama, fast_llama, "F16", **changes)
    with pytest.raises(CheckpointError, match=r"its tokenizer .*choose a GGUF file of llava-llama-3-8b"):
        PromptEncoder(path, folder / "clip_l.safetensors", None, CPU, torch.float32)


def test_a_missing_tokenizer_says_what_to_put_where(tmp_path, folder, fast_llama, fast_clip):
    for name in ("llava_llama3", "clip_l"):
        (tmp_path / f"{name}.safetensors").write_bytes((folder / f"{name}.safetensors").read_bytes())
    with pytest.raises(CheckpointError) as error:
        open_encoder(tmp_path)
    assert "hunyuanvideo-community/HunyuanVideo" in str(error.value)
    assert str(tmp_path / "tokenizer") in str(error.value)
    (tmp_path / "tokenizer").mkdir()
    fast_llama.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"clip_l\.safetensors: there is no tokenizer.*folder tokenizer_2 of"):
        open_encoder(tmp_path)
    fast_llama.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"without <\|startoftext\|>.*expected CLIP's tokenizer"):
        open_encoder(tmp_path)
    (tmp_path / "tokenizer_2").mkdir()
    (tmp_path / "tokenizer_2" / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    with pytest.raises(CheckpointError, match="its model is 'Unigram'; expected byte-level BPE"):
        open_encoder(tmp_path)
    fast_clip.backend_tokenizer.save(str(tmp_path / "tokenizer_2" / "tokenizer.json"))
    open_encoder(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path, folder):
    with pytest.raises(CheckpointError, match="absent: there is no such folder; expected one with LLaMA 3's tokenizer"):
        open_encoder(folder, tokenizers=tmp_path / "absent")


@pytest.mark.parametrize("place", [".", "tokenizer"])
def test_the_folder_of_the_tokenizers_may_be_given(tmp_path, folder, encoder, fast_llama, fast_clip, place):
    write_tokenizers(tmp_path, fast_llama, fast_clip)
    given = open_encoder(folder, tokenizers=tmp_path / place)
    assert torch.equal(given.encode(["red"])[0].text, encoder.encode(["red"])[0].text)
