"""The text encoder against transformers' UMT5EncoderModel and T5Tokenizer, and the files it loads from."""

import io
import sys

import pytest
import sentencepiece
import torch
from lowvram_video.wanvideo.text.checkpoint import BLOCK_NAMES, TOP_NAMES, load_text_encoder, open_text_encoder
from lowvram_video.wanvideo.text.encoder import TextEncoder, UMT5Encoder, position_buckets
from lowvram_video.wanvideo.text.tokenizer import Tokenizer, clean_prompt
from lowvram_video.weights.files.checkpoint import CheckpointError
from safetensors.torch import save_file
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, normalizers
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

SENTENCES = [
    "a red ball moves left over green grass",
    "a blue square moves right in the morning light",
    "a cat walks on the beach, cinematic light & soft colors",
    "the camera slowly turns around an old lighthouse at night",
    "一个红色的球向左移动",
    "一只猫在海滩上散步，电影般的光线",
    "Two dogs run; one (small) is faster than the other!",
]
PROMPTS = [
    *SENTENCES,
    "",
    "red",
    "A  ball\n\n moves\tleft  ",
    "色调艳丽，过曝，静态，细节模糊不清",
    "unseen: xyzzy Ωmega €5 🚀",
    "ball, ball, ball, grass",
    "&lt;b&gt;light&lt;/b&gt; &amp;amp; soft",
]
VOCAB = 200
NUM_TOKENS = 40
HEADS, DIM = 3, 32


def train_spiece(vocab_size: int = VOCAB, **options: int) -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_writer=written,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        pad_piece="<pad>",
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return written.getvalue()


@pytest.fixture(scope="module")
def spiece() -> bytes:
    """With umt5's ids."""
    return train_spiece(pad_id=0, eos_id=1, bos_id=2, unk_id=3)


@pytest.fixture(scope="module")
def reference() -> UMT5EncoderModel:
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=VOCAB, d_model=DIM, d_kv=64, d_ff=56, num_layers=3, num_heads=HEADS, attn_implementation="eager"
    )
    model = UMT5EncoderModel(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "layer_norm" in name:
            parameter += 0.2 * torch.randn_like(parameter)
        elif "relative_attention_bias" in name:
            parameter.normal_()
    return model


@pytest.fixture(scope="module")
def weights(reference) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in reference.state_dict().items() if "embed_tokens" not in name}


def write(path, weights, spiece=None, prefix=""):
    tensors = {prefix + name: tensor.clone() for name, tensor in weights.items()}
    if spiece is not None:
        tensors["spiece_model"] = torch.frombuffer(bytearray(spiece), dtype=torch.uint8)
    save_file(tensors, path)
    return path


@pytest.fixture
def encoder(tmp_path, weights, spiece) -> TextEncoder:
    return load_text_encoder(write(tmp_path / "umt5.safetensors", weights, spiece), num_tokens=NUM_TOKENS)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def official(weights):
    """The same weights under the names of Wan's own release."""
    renamed = {}
    for name, tensor in weights.items():
        layer, leaf = name.rsplit(".", 1)
        if layer.startswith("encoder.block."):
            number, inner = layer.removeprefix("encoder.block.").split(".", 1)
            renamed[f"blocks.{number}.{BLOCK_NAMES[inner]}.{leaf}"] = tensor
        else:
            renamed[f"{TOP_NAMES[layer]}.{leaf}"] = tensor
    return renamed


# --- model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 37, 300])  # 300 reaches past the last bucket
def test_matches_transformers(encoder, reference, length):
    torch.manual_seed(length)
    ids = torch.randint(0, VOCAB, (2, length))
    mask = torch.arange(length) < torch.tensor([[length], [max(1, length // 3)]])
    with torch.inference_mode():
        expected = reference(ids, mask.long()).last_hidden_state
        actual = encoder.model(encoder.embed(ids), mask)
        unmasked = encoder.model(encoder.embed(ids)), reference(ids).last_hidden_state
    error = max(relative_error(actual[mask], expected[mask]), relative_error(*unmasked))
    print(f"UMT5 encoder, {length} tokens: max relative error {error:.2e}")
    assert error <= 1e-4


def test_buckets_match_transformers(reference):
    attention = reference.encoder.block[0].layer[0].SelfAttention
    positions = torch.arange(400)
    expected = attention._relative_position_bucket(positions[None, :] - positions[:, None])
    assert torch.equal(position_buckets(400, 32, 128), expected)


def test_context_is_that_of_the_full_padded_length_and_then_zeros(encoder, reference):
    prompts = ["a red ball moves left", "", "一只猫在海滩上散步"]
    ids, mask = encoder.tokenizer.encode(prompts)
    context = encoder.encode(prompts)
    assert context.shape == (3, NUM_TOKENS, DIM)
    assert not context[~mask].any()
    with torch.inference_mode():
        full_length = encoder.model(encoder.embed(ids), mask)
        expected = reference(ids, mask.long()).last_hidden_state
    shortening = relative_error(context[mask], full_length[mask])
    error = relative_error(context[mask], expected[mask])
    print(f"context: max relative error {error:.2e}; from running fewer tokens {shortening:.2e}")
    assert error <= 1e-4
    assert shortening <= 1e-6


def test_what_is_padded_changes_nothing(encoder):
    ids, mask = encoder.tokenizer.encode(["a red ball"])
    with torch.inference_mode():
        clean = encoder.model(encoder.embed(ids), mask)
        filled = encoder.model(encoder.embed(torch.where(mask, ids, torch.randint(4, VOCAB, ids.shape))), mask)
    assert torch.equal(clean[mask], filled[mask])


def test_a_prompt_does_not_depend_on_its_batch(encoder):
    prompts = ["red", SENTENCES[3]]
    together = encoder.encode(prompts)
    alone = torch.cat([encoder.encode([prompt]) for prompt in prompts])
    error = relative_error(together, alone)
    print(f"batch of two against one by one: max relative error {error:.2e}")
    assert error <= 1e-6


def test_an_empty_prompt_is_its_end_token(encoder):
    context = encoder.encode([""])
    assert context[0, 0].any()
    assert not context[0, 1:].any()


def test_blocks_come_through_the_stream(encoder):
    expected = encoder.encode(["red"])
    read, seen = encoder.model.stream, []

    def stream(blocks):
        for block in read(blocks):
            seen.append(block)
            yield block

    encoder.model.stream = stream
    assert torch.equal(encoder.encode(["red"]), expected)
    assert seen == list(encoder.model.encoder.block)


@pytest.mark.parametrize("prompts", ["a string", []])
def test_prompts_must_be_a_list(encoder, prompts):
    with pytest.raises(ValueError, match="expected a list of at least one string"):
        encoder.encode(prompts)


def test_float16_computation_is_refused(encoder):
    with pytest.raises(ValueError, match="use bfloat16 or float32"):
        TextEncoder(encoder.model, encoder.embed, encoder.tokenizer, encoder.device, torch.float16)


# --- stored dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_stored_dtypes_compute_as_their_values(tmp_path, weights, spiece, stored, compute):
    cast = {name: tensor.to(stored) for name, tensor in weights.items()}
    compact = load_text_encoder(write(tmp_path / "cast.safetensors", cast, spiece), dtype=compute)
    values = {name: tensor.float() for name, tensor in cast.items()}
    exact = load_text_encoder(write(tmp_path / "values.safetensors", values, spiece))
    assert {parameter.dtype for parameter in compact.model.parameters()} == {stored}
    context = compact.encode(SENTENCES[:2])
    assert context.dtype == compute
    error = relative_error(context.float(), exact.encode(SENTENCES[:2]))
    print(f"stored {stored}, computed in {compute}: max relative error {error:.2e}")
    # bfloat16 has 8 bits of mantissa: three layers of it may add up to a few of the last ones.
    assert error <= (1e-6 if compute == torch.float32 else 3e-2)


@pytest.mark.parametrize("names", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("rowwise", [False, True])
def test_scaled_fp8(tmp_path, weights, spiece, names, rowwise):
    packed, values = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}, {}
    for name, tensor in weights.items():
        values[name] = tensor
        if tensor.ndim == 2 and "block" in name and "bias" not in name:
            layer = name.removesuffix(".weight")
            largest = tensor.abs().amax(dim=1, keepdim=True) if rowwise else tensor.abs().max()
            scale = largest / torch.finfo(torch.float8_e4m3fn).max
            packed[name] = (tensor / scale).to(torch.float8_e4m3fn)
            packed[f"{layer}.{names}"] = scale
            packed[f"{layer}.{'scale_input' if names == 'scale_weight' else 'input_scale'}"] = torch.tensor(1.0)
            values[name] = packed[name].float() * scale
        else:
            packed[name] = tensor.to(torch.bfloat16)
            values[name] = packed[name].float()
    path = write(tmp_path / "scaled.safetensors", packed, spiece)
    scaled = load_text_encoder(path)
    exact = load_text_encoder(write(tmp_path / "values.safetensors", values, spiece))
    error = relative_error(scaled.encode(SENTENCES[:2]), exact.encode(SENTENCES[:2]))
    print(f"scaled fp8: max relative error {error:.2e}")
    assert error <= 1e-6
    layers = [name for name in weights if weights[name].ndim == 2 and "block" in name and "bias" not in name]
    stored = scaled.model.state_dict()
    assert all(stored[name].dtype == torch.float8_e4m3fn for name in layers)
    assert all(f"{name}_scale" in stored for name in layers)


# --- files -----------------------------------------------------------------------------------------------


def test_layouts_load_identically(tmp_path, weights, spiece, encoder):
    expected = encoder.encode(SENTENCES)
    stack = {name.removeprefix("encoder."): tensor for name, tensor in weights.items() if name != "shared.weight"}
    embedded = {**stack, "embed_tokens.weight": weights["shared.weight"]}
    decoder = {name.replace("encoder.", "decoder."): t for name, t in weights.items() if "block" in name}
    layouts = {
        "comfyui": (weights, "text_encoders.umt5xxl.transformer."),
        "encoder only": (embedded, "encoder."),
        "stack only": (embedded, ""),
        "stack, prefixed": (embedded, "text_encoder."),
        "with a decoder": ({**decoder, "lm_head.weight": torch.ones(2, 2), **weights}, ""),
        "table saved twice": ({**weights, "encoder.embed_tokens.weight": weights["shared.weight"].clone()}, ""),
        "official": (official(weights), ""),
        "official, prefixed": (official(weights), "model."),
    }
    for title, (tensors, prefix) in layouts.items():
        path = write(tmp_path / f"{title}.safetensors", tensors, spiece, prefix)
        loaded = load_text_encoder(path, num_tokens=NUM_TOKENS)
        assert loaded.model.config == encoder.model.config, title
        assert torch.equal(loaded.encode(SENTENCES), expected), title
    print(f"{len(layouts)} layouts: identical")


def test_other_models_in_the_same_file_are_left_out(tmp_path, weights, spiece, encoder):
    merged = {"text_encoders.umt5xxl.transformer." + name: tensor for name, tensor in weights.items()}
    merged["model.diffusion_model.patch_embedding.weight"] = torch.zeros(2, 2)
    path = write(tmp_path / "all.safetensors", merged)
    file = open_text_encoder(path)
    assert file.config == encoder.model.config
    assert file.checkpoint.tensors.keys() == encoder.model.state_dict().keys()
    assert file.table.checkpoint.tensors.keys() == {"shared.weight"}


def test_dimensions_come_from_shapes(encoder):
    config = encoder.model.config
    assert (config.vocab_size, config.dim, config.attention_dim) == (VOCAB, DIM, HEADS * 64)
    assert (config.ffn_dim, config.num_heads, config.num_layers, config.num_buckets) == (56, HEADS, 3, 32)
    assert config.head_dim == 64


@pytest.mark.parametrize("place", ["spiece.model", "tokenizer/spiece.model", "google/umt5-xxl/spiece.model"])
def test_tokenizer_beside_the_file(tmp_path, weights, spiece, encoder, place):
    path = write(tmp_path / "umt5-xxl-enc.safetensors", weights)
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_bytes(spiece)
    beside = load_text_encoder(path, num_tokens=NUM_TOKENS)
    assert torch.equal(beside.encode(SENTENCES), encoder.encode(SENTENCES))


def test_a_missing_tokenizer_says_what_to_put_where(tmp_path, weights, spiece):
    path = write(tmp_path / "umt5.safetensors", weights)
    with pytest.raises(CheckpointError) as error:
        load_text_encoder(path)
    assert str(tmp_path / "spiece.model") in str(error.value)
    assert "google/umt5-xxl" in str(error.value)
    (tmp_path / "elsewhere.model").write_bytes(spiece)
    load_text_encoder(path, tokenizer_path=tmp_path / "elsewhere.model")


def test_a_damaged_or_foreign_tokenizer_is_named(tmp_path, weights):
    path = write(tmp_path / "umt5.safetensors", weights, b"not a model at all")
    with pytest.raises(CheckpointError, match=r"not a sentencepiece model: expected the spiece\.model"):
        load_text_encoder(path)
    with pytest.raises(CheckpointError, match="tokenizer cannot be read"):
        load_text_encoder(path, tokenizer_path=tmp_path / "absent.model")
    small = {**weights, "shared.weight": weights["shared.weight"][:50]}
    spiece = train_spiece(pad_id=0, eos_id=1, bos_id=2, unk_id=3)
    with pytest.raises(CheckpointError, match="50 token embeddings"):
        load_text_encoder(write(tmp_path / "small.safetensors", small, spiece))


def without(weights, *parts):
    return {name: tensor for name, tensor in weights.items() if not any(part in name for part in parts)}


WRONG_FILES = {
    r"T5-XXL \(Flux/SD3\) file.*Wan needs umt5-xxl": lambda weights: without(
        weights, "block.1.layer.0.SelfAttention.rel", "block.2.layer.0.SelfAttention.rel"
    ),
    r"lacks 1 tensor \(encoder.block.1.layer.1.layer_norm.weight\) of a umt5-xxl": lambda weights: without(
        weights, "block.1.layer.1.layer_norm"
    ),
    "shared.weight is missing": lambda weights: without(weights, "shared"),
    r"1 tensor \(encoder.extra.weight\) not known to": lambda weights: {
        **weights, "encoder.extra.weight": torch.ones(1)
    },
    r"wo.weight is \[7, 56\]; expected \[32, 56\]": lambda weights: {
        **weights, "encoder.block.2.layer.1.DenseReluDense.wo.weight": torch.ones(7, 56)
    },
    "is stored as torch.int8; expected one of torch.float32": lambda weights: {
        **weights, "encoder.block.0.layer.0.SelfAttention.k.weight": torch.ones(192, 32, dtype=torch.int8)
    },
    r"scale of .*k.weight \[192, 32\] is one of shape \[32\]; expected one number, or one": lambda weights: {
        **weights, "encoder.block.0.layer.0.SelfAttention.k.scale_weight": torch.ones(32)
    },
    "this is a CLIP text encoder": lambda _: {"text_model.encoder.layers.0.self_attn.q_proj.weight": torch.ones(1)},
    "this is a Wan VAE": lambda _: {
        "decoder.middle.0.residual.0.gamma": torch.ones(1), "conv2.weight": torch.ones(1)
    },
    "this is a Wan transformer": lambda _: {
        "patch_embedding.weight": torch.ones(1), "blocks.0.cross_attn.norm_q.weight": torch.ones(1)
    },
    "this is no known model": lambda _: {"some.weight": torch.ones(1)},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG_FILES)
def test_wrong_files_are_named(tmp_path, weights, message):
    path = write(tmp_path / "wrong.safetensors", WRONG_FILES[message](weights))
    with pytest.raises(CheckpointError, match=message) as error:
        open_text_encoder(path)
    assert str(path) in str(error.value)
    assert "expected" in str(error.value)


# --- tokenizer -------------------------------------------------------------------------------------------


def read_spiece(spiece: bytes) -> tuple[list[tuple[str, float]], bytes]:
    """Pieces with their scores, and the normalisation table, as transformers would take them from the file."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    pieces = [(processor.id_to_piece(n), processor.get_score(n)) for n in range(processor.get_piece_size())]
    normalizer = dict(protobuf_fields(spiece))[3]  # ModelProto.normalizer_spec
    return pieces, dict(protobuf_fields(normalizer))[2]  # NormalizerSpec.precompiled_charsmap


def protobuf_fields(message: bytes):
    """(field number, value) of a message; only what lengths and varints need, to do without protobuf itself."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(message):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = varint() if key & 7 == 2 else {5: 4, 1: 8}[key & 7]
        yield key >> 3, message[position : position + size]
        position += size


def test_tokenizer_matches_transformers():
    """With the ids of T5, where <unk> is 2: T5Tokenizer insists on them."""
    spiece = train_spiece(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    pieces, charsmap = read_spiece(spiece)
    reference = T5Tokenizer(vocab=pieces, _spm_precompiled_charsmap=charsmap, extra_ids=0)
    texts = [clean_prompt(prompt) for prompt in PROMPTS]
    expected = reference(texts, padding="max_length", truncation=True, max_length=NUM_TOKENS, return_tensors="pt")
    ids, mask = Tokenizer.from_bytes(spiece, NUM_TOKENS).encode(PROMPTS)
    assert torch.equal(ids, expected.input_ids)
    assert torch.equal(mask, expected.attention_mask.bool())
    print(f"{len(PROMPTS)} prompts: identical ids, {int((ids == 2).any(1).sum())} of them with unknown pieces")


@pytest.mark.parametrize("byte_fallback", [False, True])
def test_tokenizer_with_the_ids_of_umt5(byte_fallback):
    options = {"byte_fallback": True, "vocab_size": VOCAB + 256} if byte_fallback else {}
    spiece = train_spiece(pad_id=0, eos_id=1, bos_id=2, unk_id=3, **options)
    pieces, charsmap = read_spiece(spiece)
    expected = FastTokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=byte_fallback))
    expected.normalizer = normalizers.Precompiled(charsmap)
    expected.pre_tokenizer = T5Tokenizer()._tokenizer.pre_tokenizer
    tokenizer = Tokenizer.from_bytes(spiece)
    ids, mask = tokenizer.encode(PROMPTS)
    assert ids.shape == mask.shape == (len(PROMPTS), 512)
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)
    for row, prompt in enumerate(PROMPTS):
        assert ids[row][mask[row]].tolist() == [*expected.encode(clean_prompt(prompt)).ids, 1]
        assert not ids[row][~mask[row]].any()
    assert bool((ids == 3).any()) != byte_fallback


def test_too_long_a_prompt_keeps_its_end_token(spiece):
    tokenizer = Tokenizer.from_bytes(spiece, num_tokens=8)
    ids, mask = tokenizer.encode([SENTENCES[3]])
    assert mask.all()
    assert ids[0, -1] == tokenizer.eos_id
    assert (ids[0, :-1] != tokenizer.eos_id).all()


@pytest.mark.parametrize("prompt", ["<extra_id_0> ball", "</s>", "<pad>", "a </s> b", "\x00\ufeff", "<unk>"])
def test_special_tokens_in_a_prompt_are_text(spiece, prompt):
    tokenizer = Tokenizer.from_bytes(spiece)
    ids, mask = tokenizer.encode([prompt])
    own = ids[0][mask[0]].tolist()
    assert own[-1] == tokenizer.eos_id
    assert tokenizer.eos_id not in own[:-1]
    assert tokenizer.pad_id not in own
    assert max(own) < tokenizer.vocab_size


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a\n\tb   c ", "a b c"),
        ("&amp;lt;b&amp;gt;", "<b>"),
        ("", ""),
        ("一只　猫", "一只 猫"),
        ("   \n", ""),
    ],
)
def test_clean_prompt(text, cleaned):
    assert clean_prompt(text) == cleaned


def test_clean_prompt_works_without_ftfy(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert clean_prompt(" a &amp; “b” ") == "a & “b”"


def test_not_a_tokenizer(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"spiece\.model: 6 bytes are not a sentencepiece model"):
        Tokenizer.from_file(tmp_path / "spiece.model")


def test_the_model_has_the_names_of_hugging_face(weights, encoder):
    assert {"shared.weight", *UMT5Encoder(encoder.model.config, "meta").state_dict()} == weights.keys()
