"""Attention of 8-bit and 4-bit numbers, and sparse attention: signatures, refusals, and what each is compared with."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lowvram_video.attention.backend import BlockChoice
from lowvram_video.attention.probe import Machine
from lowvram_video.attention.select import AttentionUnavailable, select_attention, select_sparse
from lowvram_video.attention.sol import SolAttention
from torch import Tensor

from .inexact_packages import int8, sage_2pp, sage_3
from .sol_reference import kitchen, sol_attention
from .test_attention import CPU, SPEC, machine, plain_attention, raises, reason_for, relative_error, right

needs_kitchen = pytest.mark.skipif(
    importlib.util.find_spec("comfy_kitchen") is None
    or importlib.util.find_spec("comfy_kitchen.backends.eager.sol_attn") is None,
    reason="needs a comfy-kitchen with sol_attn",
)


def noisy(share: float) -> Callable[..., Tensor]:
    """Attention with an error of this share."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = plain_attention(q, k, v)
        noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(8), dtype=out.dtype)
        return (out + share * noise * out.norm() / noise.norm()).to(q.dtype)

    return function


Package = Callable[..., dict[str, SimpleNamespace]]
PACKAGES: dict[str, tuple[Package, tuple[int, int]]] = {
    "int8_attention": (int8, (7, 5)),
    "sageattn_2pp": (sage_2pp, (8, 9)),
    "sageattn_3": (sage_3, (12, 0)),
}
NAMES = list(PACKAGES)


def on(name: str, function: Callable[..., Tensor] = right) -> Machine:
    package, capability = PACKAGES[name]
    return machine(capability, **package(function))


@pytest.mark.parametrize("name", NAMES)
def test_each_package_is_called_by_its_signature(name: str) -> None:
    backend = select_attention(name, SPEC, on(name))
    assert backend.name == name and not backend.exact
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(2, 20, 2, 128, generator=generator).bfloat16()
    k, v = (torch.randn(2, 11, 4, 128, generator=generator).bfloat16()[:, :, 1:3] for _ in range(2))
    before = k.clone()
    out = backend.attend(q, k, v)
    error = relative_error(out, plain_attention(q, before, v))
    print(f"{name}: relative error {error:.2e}")
    assert out.shape == q.shape and error < 1e-2
    assert torch.equal(k, before), "a cached k must stay as it is"


@pytest.mark.parametrize("name", ["int8_attention", "sageattn_2pp"])
def test_heads_whose_numbers_do_not_lie_side_by_side_are_copied(name: str) -> None:
    q = torch.randn(1, 128, 2, 8, generator=torch.Generator().manual_seed(5)).bfloat16().transpose(1, 3)
    backend = select_attention(name, SPEC, on(name))
    assert relative_error(backend.attend(q, q, q), plain_attention(q, q, q)) < 1e-2


def test_newer_cards_have_scales_by_the_warp() -> None:
    where = machine((12, 0), **sage_2pp(right, granularity="per_warp"))
    assert reason_for("sageattn_2pp", SPEC, where) == "ready"


@pytest.mark.parametrize(
    "name, too_old, refused, allowed",
    [
        ("int8_attention", (7, 0), [], [(7, 5), (8, 6), (9, 0), (12, 0)]),
        ("sageattn_2pp", (8, 6), [(9, 0), (10, 0)], [(8, 9)]),
        ("sageattn_3", (9, 0), [(8, 9)], [(10, 0), (12, 0)]),
    ],
)
def test_which_cards_each_runs_on(name: str, too_old: Any, refused: list[Any], allowed: list[Any]) -> None:
    for capability in [None, too_old, *refused]:
        assert "needs an NVIDIA GPU" in reason_for(name, SPEC, replace(on(name), capability=lambda _, c=capability: c))
    for capability in allowed:
        assert reason_for(name, SPEC, replace(on(name), capability=lambda _, c=capability: c)) == "ready"


@pytest.mark.parametrize(
    "name, parts",
    [
        ("int8_attention", ("comfy_kitchen is not installed", "--upgrade comfy-kitchen", "newer versions of ComfyUI")),
        ("sageattn_2pp", ("sageattention is not installed", "SageAttention.git", "version 2.2")),
        ("sageattn_3", ("sageattn3 is not installed", "subdirectory=sageattention3_blackwell")),
    ],
)
def test_what_is_missing_is_said_with_its_command(name: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(AttentionUnavailable) as error:
        select_attention(name, SPEC, machine(PACKAGES[name][1]))
    for part in (*parts, "set attention_mode to sdpa"):
        assert part in str(error.value)


def test_a_kitchen_without_the_function_is_told_to_be_updated() -> None:
    reason = reason_for("int8_attention", SPEC, machine((8, 9), comfy_kitchen=SimpleNamespace()))
    assert "has no function int8_attention" in reason and "--upgrade comfy-kitchen" in reason


@pytest.mark.parametrize("sums", ["fp32+fp32", "fp32"])
def test_a_sage_before_2_2_is_refused(sums: str) -> None:
    reason = reason_for("sageattn_2pp", SPEC, machine((8, 9), **sage_2pp(right, sums=sums)))
    assert "before 2.2" in reason and "SageAttention.git" in reason
    old = SimpleNamespace(sageattn_qk_int8_pv_fp8_cuda=lambda q, k, v: q)
    assert "before 2.2" in reason_for("sageattn_2pp", SPEC, machine((8, 9), sageattention=old))


@pytest.mark.parametrize("name", NAMES)
def test_quantisation_passes_and_what_is_wrong_does_not(name: str) -> None:
    allowed = 0.2 if name == "sageattn_3" else 0.03
    assert reason_for(name, SPEC, on(name, noisy(allowed))) == "ready"
    assert "differs from plain attention" in reason_for(name, SPEC, on(name, noisy(2 * allowed)))
    assert "differs from plain attention" in reason_for(name, SPEC, on(name, lambda q, k, v: torch.zeros_like(q)))
    assert "NaN" in reason_for(name, SPEC, on(name, lambda q, k, v: torch.full_like(q, torch.nan)))
    assert "no kernel image" in reason_for(name, SPEC, on(name, raises(RuntimeError("no kernel image"))))


def test_auto_never_takes_one_of_them() -> None:
    where = machine((12, 0), **int8(right), **sage_2pp(right, granularity="per_warp"), **sage_3(right))
    assert select_attention("auto", SPEC, where).name == "sdpa"


# measured on an H200: 801 and 1852 MiB with the output, which is 320 and 738
@pytest.mark.parametrize("length, mib", [(32760, 801 - 320), (75600, 1852 - 738)])
def test_int8_takes_what_it_says(length: int, mib: float) -> None:
    workspace = select_attention("int8_attention", SPEC, on("int8_attention")).workspace
    assert workspace.nbytes(length, length, 40, 128) / 2**20 == pytest.approx(mib, rel=0.02)


def test_sage_3_says_what_its_scores_of_means_take() -> None:
    workspace = select_attention("sageattn_3", SPEC, on("sageattn_3")).workspace
    scores = 40 * 32768 // 128 * 32768 * 4  # fp32, kept while attention runs
    assert workspace.nbytes(32768, 32768, 40, 128) > scores


# --- sparse


def sparse_machine(
    function: Callable[..., Any] = sol_attention, capability: tuple[int, int] | None = (8, 0)
) -> Machine:
    return machine(capability, **kitchen(function))


def planted(
    length: int, heads: int = 2, seed: int = 0, groups: int = 6, length_of_group: int = 50, alike: float = 0.6
) -> list[Tensor]:
    """q, k and v whose tokens attend few places: neighbours in groups have keys in common, by how `alike` they are."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.arange(length) // length_of_group % groups
    centres = torch.randn(groups, heads, 128, generator=generator)
    q, k = (alike * centres[places][None] + torch.randn(1, length, heads, 128, generator=generator) for _ in range(2))
    return [q, k, torch.randn(1, length, heads, 128, generator=generator) + centres[places][None]]


def test_sparse_runs_where_it_agrees_with_its_own_reference() -> None:
    assert select_sparse(SPEC, sparse_machine()).name == "sol_attn"


@pytest.mark.parametrize(
    "function, expected",
    [
        (lambda q, k, v, **blocks: right(q, k, v), "differs from its own reference"),  # dense is not what was asked for
        (lambda q, k, v, **blocks: sol_attention(q, k, v, **{**blocks, "sink_blocks": [0, 0]}), "its own reference"),
        (lambda q, k, v, **blocks: sol_attention(q, k, v, **{**blocks, "sink_q": [0, 0]}), "its own reference"),
        (lambda q, k, v, **blocks: sol_attention(q, k, v, **{**blocks, "topk_ratio": 0.0}), "its own reference"),
        (lambda q, k, v, **blocks: torch.zeros_like(q), "its own reference"),
        (lambda q, k, v, **blocks: torch.full_like(q, torch.nan), "NaN"),
    ],
)  # fmt: skip
def test_a_sparse_kernel_that_does_something_else_is_refused(function: Callable[..., Any], expected: str) -> None:
    with pytest.raises(AttentionUnavailable, match="sparse attention") as error:
        select_sparse(SPEC, sparse_machine(function))
    assert expected in str(error.value)


@pytest.mark.parametrize(
    "spec, where, expected",
    [
        (SPEC, machine((7, 5), **kitchen()), "compute capability 8.0"),
        (replace(SPEC, head_dim=64), sparse_machine(), "takes head dim 128, and the model's is 64"),
        (replace(SPEC, dtype=torch.float32), sparse_machine(), "load it in bfloat16"),
        (SPEC, machine(), "comfy_kitchen is not installed"),
        (SPEC, machine((8, 0), comfy_kitchen=SimpleNamespace()), "no function sol_attn"),
    ],
)
def test_what_sparse_needs(spec: Any, where: Machine, expected: str) -> None:
    with pytest.raises(AttentionUnavailable) as error:
        select_sparse(spec, where)
    assert expected in str(error.value)
    if "kitchen" in expected or "function" in expected:
        assert "--upgrade comfy-kitchen" in str(error.value)


def test_sparse_tensors_are_copied_where_they_could_not_be_read() -> None:
    seen: list[Tensor] = []

    def reads_16_bytes(q: Tensor, k: Tensor, v: Tensor, **blocks: Any) -> Tensor:
        for tensor in (q, k, v):
            assert tensor.stride(-1) == 1 and tensor.data_ptr() % 16 == 0
            assert all(stride % 8 == 0 for stride in tensor.stride()[:3])
        seen.extend((q, k, v))
        return sol_attention(q, k, v, **blocks)

    backend = select_sparse(SPEC, sparse_machine(reads_16_bytes))
    wide = torch.randn(1, 200, 2, 132, generator=torch.Generator().manual_seed(3)).bfloat16()
    odd = wide[..., 3:131]
    whole = torch.randn(1, 200, 4, 128, generator=torch.Generator().manual_seed(3)).bfloat16()[:, :, 1:3]
    seen.clear()
    backend.attend(odd, odd.transpose(1, 2).contiguous().transpose(1, 2), whole, BlockChoice())
    assert seen[2] is whole  # heads out of a wider buffer go as they are
    assert seen[0] is not odd


def test_all_blocks_as_sinks_are_dense() -> None:
    q, k, v = planted(300)
    backend = SolAttention(CPU, sparse_machine())
    assert backend.refuse(replace(SPEC, dtype=torch.bfloat16)) is None
    error = relative_error(backend.attend(q, k, v, BlockChoice(sinks=(0, 5))), plain_attention(q, k, v))
    sparse = relative_error(backend.attend(q, k, v, BlockChoice(top_k=0.2)), plain_attention(q, k, v))
    print(f"all sinks: {error:.1e}, top-k 0.2: {sparse:.1e}")
    assert error < 1e-5 < 1e-3 < sparse


# measured on an H200: 871 and 2071 MiB with the output, which is 320 and 738
@pytest.mark.parametrize("length, mib", [(32760, 871 - 320), (75600, 2071 - 738)])
def test_sparse_takes_no_more_than_it_says(length: int, mib: float) -> None:
    said = select_sparse(SPEC, sparse_machine()).workspace.nbytes(length, length, 40, 128) / 2**20
    assert mib < said < 1.25 * mib


@needs_kitchen
@pytest.mark.parametrize(
    "blocks",
    [BlockChoice(0.5), BlockChoice(1.0, sinks=(3, 5)), BlockChoice(top_k=0.3), BlockChoice(1.0, exact_queries=(0, 2))],
)
def test_our_reference_is_the_packages(blocks: BlockChoice) -> None:
    eager = importlib.import_module("comfy_kitchen.backends.eager.sol_attn")
    q, k, v = planted(300)
    arguments = {"tau": blocks.tau, "topk_ratio": blocks.top_k}
    arguments |= {"sink_blocks": list(blocks.sinks), "sink_q": list(blocks.exact_queries)}
    error = relative_error(eager.sol_attn(q, k, v, **arguments), sol_attention(q, k, v, **arguments).double())
    print(f"{blocks}: {error:.1e}")
    assert error < 1e-5


@needs_kitchen
def test_the_packages_own_reference_is_found() -> None:
    """Where no GPU is, its function runs by that reference."""
    backend = SolAttention(CPU, Machine(capability=lambda _: (8, 0)))
    assert backend.refuse(SPEC) is None
    q, k, v = planted(200)
    out = backend.attend(q, k, v, BlockChoice(top_k=0.3))
    assert relative_error(out, backend.reference(q, k, v, BlockChoice(top_k=0.3)).double()) < 1e-5
