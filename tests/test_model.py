"""The transformer against diffusers' WanTransformer3DModel with the same weights, fp32."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from lowvram_video.attention.sdpa import Sdpa
from lowvram_video.fused.eager import EagerOps
from lowvram_video.system.words import copy_in_words
from lowvram_video.transformer import workspace
from lowvram_video.transformer.execution import Execution
from lowvram_video.transformer.workspace import Rows, Workspace
from lowvram_video.wanvideo.checkpoint import official_names
from lowvram_video.wanvideo.network.config import WanConfig
from lowvram_video.wanvideo.network.embeddings import AxisPositions
from lowvram_video.wanvideo.network.model import Extras, WanModel
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

TINY = {"dim": 64, "ffn_dim": 96, "num_heads": 2, "num_layers": 3, "text_dim": 24, "freq_dim": 32}
VARIANTS = {
    "t2v": WanConfig("t2v", in_channels=4, out_channels=4, **TINY),
    "wide ffn": WanConfig("t2v", in_channels=4, out_channels=4, **{**TINY, "ffn_dim": 320}),
    "i2v": WanConfig("i2v", in_channels=9, out_channels=4, image_dim=20, **TINY),
    "flf2v": WanConfig("flf2v", in_channels=9, out_channels=4, image_dim=20, image_pos_tokens=14, **TINY),
    "i2v without image tokens": WanConfig("i2v", in_channels=9, out_channels=4, **TINY),
    "ti2v": WanConfig("ti2v", in_channels=6, out_channels=6, **TINY),
}


def reference_of(config: WanConfig) -> WanTransformer3DModel:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
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
    for parameter in model.parameters():
        # norm weights and modulation away from their neutral start
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.eval().requires_grad_(False)


def ours_of(config: WanConfig, reference: WanTransformer3DModel) -> WanModel:
    state = reference.state_dict()
    names = official_names(state)
    model = WanModel(config)
    model.load_state_dict({names[name]: tensor for name, tensor in state.items()}, assign=True)
    return model


def inputs_of(config: WanConfig, batch: int = 2, size: tuple[int, int, int] = (3, 8, 10)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "latent": torch.randn(batch, config.in_channels, *size, generator=generator),
        # 512: diffusers tells text from image tokens by that length
        "context": torch.randn(batch, 512, config.text_dim, generator=generator),
        "timestep": torch.tensor([837.0, 120.5])[:batch],
    }
    if config.model_type == "ti2v":  # frame 0 is the given image: timestep 0
        inputs["timestep"] = torch.tensor([[0.0, 700.0, 700.0], [0.0, 310.0, 310.0]])[:batch]
    if config.image_dim:
        tokens = config.image_pos_tokens or 7
        inputs["image_tokens"] = torch.randn(batch, tokens, config.image_dim, generator=generator)
    return inputs


def run_reference(model: WanTransformer3DModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    timestep = inputs["timestep"]
    if timestep.ndim == 2:  # diffusers wants one per token
        tokens_per_frame = inputs["latent"].shape[3] * inputs["latent"].shape[4] // 4
        timestep = timestep.repeat_interleave(tokens_per_frame, dim=1)
    image = inputs.get("image_tokens")
    if image is not None and model.config.pos_embed_seq_len:  # and both images as two batch rows
        image = image.reshape(-1, image.shape[1] // 2, image.shape[2])
    return model(inputs["latent"], timestep, inputs["context"], image, return_dict=False)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_velocity_equals_diffusers(variant: str) -> None:
    config = VARIANTS[variant]
    reference, inputs = reference_of(config), inputs_of(config)
    want = run_reference(reference, inputs)
    got = ours_of(config, reference)(**inputs)
    error = float((got - want).abs().max() / want.abs().max())
    print(f"{variant}: max relative error {error:.2e}")
    assert error <= 1e-4


@pytest.mark.parametrize("variant", ["t2v", "wide ffn", "i2v", "ti2v"])
@pytest.mark.parametrize(
    ("token_chunk", "head_groups", "query_chunk"),
    [(7, 1, None), (64, 2, None), (1000, 2, None), (7, 1, 17), (64, 2, 30), (1000, 1, 60), (64, 2, 100)],
)
def test_chunks_change_nothing_but_rounding(
    variant: str, token_chunk: int, head_groups: int, query_chunk: int | None
) -> None:
    config = VARIANTS[variant]
    model, inputs = ours_of(config, reference_of(config)), inputs_of(config)
    want = model(**inputs)
    model.execution = Execution(token_chunk=token_chunk, head_groups=head_groups, query_chunk=query_chunk)
    got = model(**inputs)
    assert float((got - want).abs().max() / want.abs().max()) < 2e-6


@pytest.mark.parametrize("query_chunk", [None, 17])
def test_keys_and_values_in_8_bits_are_near_the_exact_ones(query_chunk: int | None) -> None:
    config = VARIANTS["i2v"]
    model, inputs = ours_of(config, reference_of(config)), inputs_of(config)
    want = model(**inputs)
    model.execution = Execution(token_chunk=16, head_groups=2, query_chunk=query_chunk, packed_keys=True)
    sizes, workspace = [], model.workspace

    def seen(*args: object) -> object:
        work = workspace(*args)
        sizes.append(work.pool.numel() - work.query_rows * config.dim)
        return work

    model.workspace = seen
    got = model(**inputs)
    error = float((got - want).norm() / want.norm())
    print(f"8-bit keys and values, queries {query_chunk}: relative error of the velocity {error:.1e}")
    assert 0 < error < 4e-3
    rows = 2 * 3 * 4 * 5
    assert sizes == [2 * rows * config.dim // 4]  # one byte instead of fp32's four


class CopiedNumbers(TorchDispatchMode):
    """The dtypes of what is copied into tensors that are there."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("head_dim", [8, 6])
def test_what_groups_of_heads_attended_is_copied_in_words_of_16_bytes(head_dim: int) -> None:
    execution = Execution(dtype=torch.bfloat16, head_groups=2)
    work = Workspace(execution, Rows(10, 4 * head_dim, 8 * head_dim, num_heads=4), torch.device("cpu"), 0)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 10, 4, head_dim, generator=generator).bfloat16() for _ in range(3))
    want = F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (q, k, v))).transpose(1, 2)
    with CopiedNumbers() as copied:
        got = work.attend(q, [(k, v)])
    assert torch.equal(got, want)
    assert copied.dtypes == 2 * [torch.complex128 if head_dim == 8 else torch.bfloat16]  # 6 of 2 bytes are no words


def test_what_is_attended_in_another_dtype_is_converted() -> None:
    """A function of another pack may return such: fp16 has as many bytes as bf16, but other bits."""
    for dtype in (torch.float16, torch.float32):
        attended, q = torch.randn(10, 16).to(dtype), torch.empty(10, 16, dtype=torch.bfloat16)
        copy_in_words(attended, q)
        assert q.equal(attended.bfloat16())


class CountingOps(EagerOps):
    """The rows of each norm that is modulated."""

    def __init__(self) -> None:
        self.normed: list[int] = []

    def modulated_norm(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
        self.normed.append(x.shape[0])
        return super().modulated_norm(x, *args)


@pytest.mark.parametrize("packed_keys", [False, True])
def test_rows_whose_queries_exist_beside_all_keys_are_normed_once_for_both(packed_keys: bool) -> None:
    config, ops = VARIANTS["t2v"], CountingOps()
    model, inputs = ours_of(config, reference_of(config)), inputs_of(config)
    model.execution = Execution(ops=ops, token_chunk=20, query_chunk=30, packed_keys=packed_keys)
    model(**inputs)
    rows, first = 2 * 60, 30
    of_a_block = rows + (rows - first) + rows  # keys and values, the other queries, feed-forward
    assert sum(ops.normed) == config.num_layers * of_a_block + rows  # and the head
    assert max(ops.normed) == 20


class SeenAttention(Sdpa):
    """The rows and heads of each call, by how many keys it has."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.calls: list[tuple[int, int, int]] = []

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.calls.append((k.shape[1], q.shape[1], q.shape[2]))
        return super().attend(q, k, v)


@pytest.mark.parametrize("query_chunk", [None, 30])
def test_attention_to_text_needs_no_groups_of_heads(query_chunk: int | None) -> None:
    """A chunk's result is as small as its norm: nothing is copied to its place."""
    config, attention = VARIANTS["t2v"], SeenAttention()
    model, inputs = ours_of(config, reference_of(config)), inputs_of(config)
    want = model(**inputs)
    model.execution = Execution(attention=attention, token_chunk=20, head_groups=2, query_chunk=query_chunk)
    with CopiedNumbers() as copied:
        got = model(**inputs)
    assert float((got - want).abs().max() / want.abs().max()) < 2e-6
    of_text = [call for call in attention.calls if call[0] == 512]
    assert set(of_text) == {(512, 20, 2)}
    of_tokens = [call for call in attention.calls if call[0] == 60]
    assert {heads for *_, heads in of_tokens} == {1}
    assert copied.dtypes.count(torch.complex128) == len(of_tokens)


def test_attention_that_must_see_all_queries_does_under_the_leanest_plan() -> None:
    config = VARIANTS["t2v"]
    model, inputs = ours_of(config, reference_of(config)), inputs_of(config)
    want = model(**inputs)
    model.execution = Execution(query_chunk=17, packed_keys=True, all_queries=True)
    work = model.workspace(60, torch.device("cpu"))
    assert work.query_rows == 60 and not work.packs_keys
    assert torch.equal(model(**inputs), want)


@pytest.mark.parametrize("variant", ["t2v", "ti2v"])
def test_fp16_carries_a_residual_stream_beyond_its_numbers(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As GPUs without bf16 run it (compute capability 7.5)."""
    config = VARIANTS[variant]
    model, inputs = ours_of(config, reference_of(config)), inputs_of(config)
    for block in model.blocks:  # what the blocks add grows to a few hundred thousand
        block.modulation.data[:, 5] = 2e5
    largest = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, __: largest.append(float(args[0].float().abs().max())))
    want = model(**inputs)
    assert max(largest) > 2 * 65504
    largest.clear()
    model.execution = Execution(dtype=torch.float16, token_chunk=16)
    got = model(**inputs)
    error = float((got - want).norm() / want.norm())
    print(f"fp16 with a residual stream of up to 1e5 and more: relative error {error:.1e}")
    assert bool(got.isfinite().all()) and 1000 < max(largest) < 65504
    assert error < 1e-2
    monkeypatch.setattr(workspace, "FP16_RESIDUAL", 1.0)
    assert float((model(**inputs) - want).norm() / want.norm()) > 0.1  # it needs the factor, and never makes NaN


def test_infinities_of_fp16_do_not_spread() -> None:
    x = torch.tensor([[1.0, -2.0, 3.0, 60000.0]], dtype=torch.float16)
    y = torch.tensor([[torch.inf, -torch.inf, torch.inf, 60000.0]], dtype=torch.float16)
    EagerOps().gated_add_(x, y, torch.tensor([[0.0, 1.0, 0.5, 1.0]]), 0, 1)
    assert x.tolist() == [[1.0, -65504.0, 32752.0, 65504.0]]


def test_a_batch_equals_its_samples_in_turn() -> None:
    config = VARIANTS["i2v"]
    model, inputs = ours_of(config, reference_of(config)), inputs_of(config)
    together = model(**inputs)
    for i in range(2):
        alone = model(**{name: tensor[i : i + 1] for name, tensor in inputs.items()})
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


class Turned:
    """Self-attention of a pass whose tokens come last one first, and with them all that is theirs."""

    reorders = True

    def __init__(self, model: WanModel) -> None:
        self.attend = model.execution.attention.attend
        self.turned = False

    def begin_layer(self, layer: int, tokens: Sequence[torch.Tensor], spare: torch.Tensor) -> None:
        for each in [] if self.turned else tokens:
            each.copy_(each.flip(0))
        self.turned = True

    def end(self, tokens: torch.Tensor, spare: torch.Tensor) -> None:
        tokens.copy_(tokens.flip(0))


def test_angles_are_kept_for_the_next_pass_unless_they_were_brought_in_another_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = VARIANTS["t2v"]
    model, inputs = ours_of(config, reference_of(config)), inputs_of(config, batch=1)
    with torch.no_grad():
        want = model(**inputs)
        kept = model.angles((3, 4, 5), Extras(), inputs["latent"].device)
        assert model.angles((3, 4, 5), Extras(), inputs["latent"].device) is kept
        with monkeypatch.context() as patch:
            patch.setattr(model, "begin_attention", lambda *given: Turned(model))
            torch.testing.assert_close(model(**inputs), want, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(**inputs), want)
        shifted = Extras(positions=AxisPositions(shift=(2.0, 0.0, 0.0)))
        assert not torch.equal(model.angles((3, 4, 5), shifted, inputs["latent"].device).sin, kept.sin)
        other = {**inputs, "latent": inputs["latent"][..., :8]}
        assert torch.equal(model(**other), ours_of(config, reference_of(config))(**other))


def test_cached_keys_and_values_change_nothing() -> None:
    config = VARIANTS["i2v"]
    model, inputs = ours_of(config, reference_of(config)), inputs_of(config)
    context = model.embed_context(inputs["context"], inputs["image_tokens"])
    context.keys_values = [block.cross_attn.keys_values(context) for block in model.blocks]
    got = model(inputs["latent"], inputs["timestep"], context)
    assert torch.equal(got, model(**inputs))


@pytest.mark.parametrize(("stored", "bound"), [(torch.bfloat16, 2e-2), (torch.float8_e4m3fn, 0.2)])
def test_weights_stored_in_another_dtype_are_cast_when_used(stored: torch.dtype, bound: float) -> None:
    config = VARIANTS["t2v"]
    model, inputs = ours_of(config, reference_of(config)), inputs_of(config)
    want = model(**inputs)
    for module in model.blocks.modules():
        if hasattr(module, "in_features"):
            rounded = module.weight.to(stored)
            module.weight = torch.nn.Parameter(rounded, requires_grad=False)
    got = model(**inputs)
    assert model.blocks[0].scratch_elements(torch.float32) == 3 * config.dim**2
    error = float((got - want).norm() / want.norm())
    print(f"{stored}: relative error {error:.2e}")
    assert 0 < error < bound


def test_a_latent_of_another_model_is_refused() -> None:
    config = VARIANTS["i2v"]
    model, inputs = ours_of(config, reference_of(config)), inputs_of(config)
    with pytest.raises(ValueError, match=r"latent has 4 channels but this Wan model takes 9"):
        model(inputs["latent"][:, :4], inputs["timestep"], inputs["context"])
    with pytest.raises(ValueError, match=r"\(3, 7, 10\).*not divisible"):
        model(inputs["latent"][:, :, :, :7], inputs["timestep"], inputs["context"])


def test_names_are_the_official_ones() -> None:
    names = set(WanModel(VARIANTS["flf2v"], device="meta").state_dict())
    for expected in (
        "patch_embedding.weight", "text_embedding.0.weight", "text_embedding.2.bias", "time_embedding.0.weight",
        "time_projection.1.weight", "blocks.0.self_attn.norm_q.weight", "blocks.0.cross_attn.k_img.weight",
        "blocks.0.cross_attn.norm_k_img.weight", "blocks.2.ffn.0.weight", "blocks.2.ffn.2.bias", "blocks.1.norm3.bias",
        "blocks.1.modulation", "head.head.weight", "head.modulation", "img_emb.proj.0.weight", "img_emb.proj.4.bias",
        "img_emb.emb_pos",
    ):  # fmt: skip
        assert expected in names
    assert not any("norm1" in name or "norm2" in name for name in names)
