"""Attention: the numbers of every backend's call, and every rule of the choice, with fake packages and GPUs."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lowvram_video.attention import sdpa as sdpa_module
from lowvram_video.attention.backend import EXACT_WORKSPACE, AttentionSpec
from lowvram_video.attention.flash import FlashAttention2, FlashAttention3
from lowvram_video.attention.int8 import Int8Attention
from lowvram_video.attention.probe import THIS_MACHINE, Machine, nvidia_capability
from lowvram_video.attention.sage import SageAttention
from lowvram_video.attention.sage_2pp import SageAttention2pp
from lowvram_video.attention.sage_3 import SageAttention3
from lowvram_video.attention.sdpa import CUDNN_FIRST, Sdpa
from lowvram_video.attention.select import ATTENTION_MODES, AttentionUnavailable, select_attention
from torch import Tensor

from .inexact_packages import int8, sage_2pp, sage_3

CPU = torch.device("cpu")
# The fakes compute on the CPU, so their spec names it; a fake capability makes it pass for a GPU.
SPEC = AttentionSpec(CPU, torch.bfloat16, 128)
FIX = "; or set attention_mode to sdpa, which runs everywhere"


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v in float64; [B, L, H, D] in and out."""
    q, k, v = q.double(), k.double(), v.double()
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


def right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain_attention(q, k, v).to(q.dtype)


def sage_1(function: Callable[..., Tensor] = right, calls: list[dict[str, Any]] | None = None) -> SimpleNamespace:
    """PyPI 1.0.6: subtracts the mean from k in place, and is wrong without smooth_k."""

    def sageattn(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tensor_layout: str = "HND",
        is_causal: bool = False,
        sm_scale: float | None = None,
        smooth_k: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        assert not kwargs
        assert tensor_layout == "NHD"
        assert not is_causal
        assert q.shape[-1] in (64, 96, 128)
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        if not smooth_k:
            return torch.zeros_like(q)
        if calls is not None:
            calls.append({"version": 1, "k": k})
        k -= k.mean(1, keepdim=True)
        return function(q, k, v)

    return SimpleNamespace(sageattn=sageattn)


def sage_2(function: Callable[..., Tensor] = right, calls: list[dict[str, Any]] | None = None) -> SimpleNamespace:
    """2.x: swallows unknown arguments, attn_mask among them."""

    def sageattn(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tensor_layout: str = "HND",
        is_causal: bool = False,
        sm_scale: float | None = None,
        return_lse: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        assert not kwargs
        assert tensor_layout == "NHD"
        assert not is_causal
        assert not return_lse
        if calls is not None:
            calls.append({"version": 2, "k": k})
        return function(q, k, v)

    return SimpleNamespace(sageattn=sageattn)


def flash(function: Callable[..., Any] = right) -> SimpleNamespace:
    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Any:
        assert not causal
        return function(q, k, v)

    return SimpleNamespace(flash_attn_func=flash_attn_func)


def machine(
    capability: tuple[int, int] | None = (8, 9),
    platform: str = "linux",
    **modules: SimpleNamespace | BaseException,
) -> Machine:
    """A machine with these packages; an exception in a package's place is what its import raises."""

    def import_module(name: str) -> Any:
        module = modules.get(name, ModuleNotFoundError(f"No module named '{name}'", name=name))
        if isinstance(module, BaseException):
            raise module
        return module

    return Machine(import_module, lambda _device: capability, platform, "python")


def reason_for(name: str, spec: AttentionSpec, where: Machine) -> str:
    """Why a backend does not run there, or "ready"."""
    try:
        select_attention(name, spec, where)
    except AttentionUnavailable as error:
        return str(error).partition(f"cannot run {spec}: ")[2].removesuffix(FIX)
    return "ready"


# --- sdpa: the numbers


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("k_length", [40, 17])
def test_sdpa_equals_a_plain_softmax(dtype: torch.dtype, bound: float, k_length: int) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 40, 3, 16, generator=generator).to(dtype)
    k, v = (torch.randn(2, k_length, 3, 16, generator=generator).to(dtype) for _ in range(2))
    out = Sdpa(CPU).attend(q, k, v)
    error = relative_error(out, plain_attention(q, k, v))
    print(f"sdpa {dtype} k length {k_length}: relative error {error:.2e}")
    assert out.shape == q.shape
    assert out.dtype == dtype
    assert error < bound


def test_sdpa_takes_a_group_of_heads_out_of_a_wider_buffer() -> None:
    generator = torch.Generator().manual_seed(2)
    wide = torch.randn(2, 30, 3, 8, 16, generator=generator)  # [B, L, qkv, H, D]
    q, k, v = (wide[:, :, i, 2:5] for i in range(3))
    assert not q.is_contiguous()
    out = Sdpa(CPU).attend(q, k, v)
    error = relative_error(out, plain_attention(q, k, v))
    print(f"sdpa on strided heads: relative error {error:.2e}")
    assert error < 1e-5


@pytest.mark.parametrize("capability", [None, (8, 9), (9, 0)])
def test_sdpa_compiles_into_one_graph(capability: tuple[int, int] | None) -> None:
    backend = Sdpa(CPU, machine(capability))
    q = torch.randn(1, 12, 2, 16, generator=torch.Generator().manual_seed(3))
    compiled = torch.compile(lambda x: backend.attend(x + 1, x, x) * 2, backend="eager", fullgraph=True)
    error = relative_error(compiled(q), plain_attention(q + 1, q, q) * 2)
    print(f"sdpa compiled for {capability}: relative error {error:.2e}")
    assert error < 1e-5


def test_cudnn_is_first_from_hopper_on_and_torch_keeps_its_order_elsewhere() -> None:
    for capability in [(9, 0), (10, 0), (12, 0)]:
        assert Sdpa(CPU, machine(capability)).order == list(CUDNN_FIRST)
    for capability in [None, (7, 5), (8, 9)]:
        assert Sdpa(CPU, machine(capability)).order is None


def test_without_set_priority_torch_keeps_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa_module, "sdpa_kernel", lambda backends: None)  # torch 2.4's signature
    assert Sdpa(CPU, machine((9, 0))).order is None


def test_sdpa_gives_up_on_a_broken_cudnn(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def no_engine(backends: list[Any], set_priority: bool = False) -> None:
        raise RuntimeError("cuDNN Frontend error: no valid execution plans built")

    monkeypatch.setattr(sdpa_module, "sdpa_kernel", no_engine)
    backend = select_attention("sdpa", SPEC, machine((12, 0)))
    assert isinstance(backend, Sdpa)
    assert backend.order is None
    assert "no valid execution plans" in caplog.text


def test_threads_that_attend_at_once_leave_torch_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its switches are the process's: cards that make a sample each set them from threads of their own."""
    orders, before = [], torch._C._get_sdp_priority_order()
    attention = F.scaled_dot_product_attention

    def slow_attention(*qkv: torch.Tensor) -> torch.Tensor:
        time.sleep(0.002)  # another thread's turn
        orders.append(torch._C._get_sdp_priority_order()[0])
        return attention(*qkv)

    monkeypatch.setattr(F, "scaled_dot_product_attention", slow_attention)
    q = torch.randn(1, 4, 1, 8)

    def attend() -> None:
        for _ in range(10):
            Sdpa(CPU, machine((9, 0))).attend(q, q, q)

    threads = [threading.Thread(target=attend) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert orders == [int(CUDNN_FIRST[0])] * 30
    assert torch._C._get_sdp_priority_order() == before


# --- the packages' calls


@pytest.mark.parametrize("package, version", [(sage_1, 1), (sage_2, 2)])
def test_sage_calls_each_version_by_its_signature(package: Callable[..., SimpleNamespace], version: int) -> None:
    calls: list[dict[str, Any]] = []
    backend = select_attention("sageattn", SPEC, machine(sageattention=package(calls=calls)))
    assert {call["version"] for call in calls} == {version}
    assert not backend.exact
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(2, 20, 2, 128, generator=generator).bfloat16()
    k, v = (torch.randn(2, 11, 4, 128, generator=generator).bfloat16()[:, :, 1:3] for _ in range(2))
    before = k.clone()
    error = relative_error(backend.attend(q, k, v), plain_attention(q, before, v))
    print(f"sage {version}: relative error {error:.2e}")
    assert error < 5e-2
    assert torch.equal(k, before), "1.0.6 works in place; a cached k must stay as it is"


# measured on an H200: benchmarks/results/workspaces_h200_2026-11-28.json
@pytest.mark.parametrize(
    "rows, keys, heads, mib", [(32760, 32760, 40, 960.2), (32760, 32760, 10, 240.0), (8192, 32760, 40, 840.1)]
)
def test_sage_1_takes_what_it_says(rows: int, keys: int, heads: int, mib: float) -> None:
    backend = select_attention("sageattn", SPEC, machine((9, 0), sageattention=sage_1()))
    assert backend.workspace.nbytes(rows, keys, heads, 128) / 2**20 == pytest.approx(mib, rel=0.01)


def test_sage_2_has_v_once_more_on_hopper() -> None:
    elsewhere, hopper = (
        select_attention("sageattn", SPEC, machine(capability, sageattention=sage_2())).workspace
        for capability in ((8, 9), (9, 0))
    )
    assert hopper.nbytes(100, 100, 4, 128) - elsewhere.nbytes(100, 100, 4, 128) == 100 * 4 * 128


@pytest.mark.parametrize("package", [sage_1, sage_2])
def test_sage_is_spared_short_ragged_lengths_when_it_counts_padding(package: Callable[..., SimpleNamespace]) -> None:
    def counts_padding(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = k - k.mean(1, keepdim=True)
        padding = (0, 0, 0, 0, 0, -k.shape[1] % 64)
        return right(q, torch.nn.functional.pad(k, padding), torch.nn.functional.pad(v, padding))

    calls: list[dict[str, Any]] = []
    backend = select_attention("sageattn", SPEC, machine(sageattention=package(counts_padding, calls)))
    q = torch.randn(1, 8, 1, 128, generator=torch.Generator().manual_seed(11)).bfloat16()
    for k_length, by_sage in [(257, False), (512, True), (7800, True), (16065, False), (16129, True)]:
        k = torch.randn(1, k_length, 1, 128, generator=torch.Generator().manual_seed(12)).bfloat16()
        calls.clear()
        error = relative_error(backend.attend(q, k, k), plain_attention(q, k, k))
        print(f"k length {k_length}: relative error {error:.2e}")
        assert error < 1e-2
        assert bool(calls) == by_sage
        # and a plan counts what is called
        own = backend.workspace
        taken = own if by_sage else EXACT_WORKSPACE
        assert own.nbytes(k_length, k_length, 4, 128, k_length) == taken.nbytes(k_length, k_length, 4, 128)
        assert own.spares(k_length) != by_sage
    assert own.nbytes(257, 257, 4, 128) > 5 * 257 * 4 * 128, "where lengths are not known"


@pytest.mark.parametrize("package", [sage_1, sage_2])
def test_sage_runs_every_length_when_its_kernels_mask_the_padding(package: Callable[..., SimpleNamespace]) -> None:
    calls: list[dict[str, Any]] = []
    backend = select_attention("sageattn", SPEC, machine(sageattention=package(calls=calls)))
    calls.clear()
    q = torch.randn(1, 257, 1, 128).bfloat16()
    backend.attend(q, q, q)
    assert len(calls) == 1


@pytest.mark.parametrize("package", [sage_1, sage_2])
def test_sage_gets_a_contiguous_last_dimension(package: Callable[..., SimpleNamespace]) -> None:
    backend = select_attention("sageattn", SPEC, machine(sageattention=package()))
    q = torch.randn(1, 128, 2, 8, generator=torch.Generator().manual_seed(5)).bfloat16().transpose(1, 3)
    assert q.stride(-1) != 1
    assert relative_error(backend.attend(q, q, q), plain_attention(q, q, q)) < 5e-2


@pytest.mark.parametrize("returned", [right, lambda q, k, v: (right(q, k, v), torch.zeros(1))])
@pytest.mark.parametrize("mode, module", [("flash_attn_2", "flash_attn"), ("flash_attn_3", "flash_attn_interface")])
def test_flash_returns_a_tensor_or_a_tuple(mode: str, module: str, returned: Callable[..., Any]) -> None:
    backend = select_attention(mode, SPEC, machine((9, 0), **{module: flash(returned)}))
    q = torch.randn(2, 9, 2, 128, generator=torch.Generator().manual_seed(6)).bfloat16()
    k = torch.randn(2, 5, 2, 128, generator=torch.Generator().manual_seed(7)).bfloat16()
    assert backend.exact
    assert relative_error(backend.attend(q, k, k), plain_attention(q, k, k)) < 1e-2


def test_packages_are_found_in_sys_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", flash())  # type: ignore[arg-type]
    backend = select_attention("flash_attn_2", SPEC, Machine(capability=lambda _device: (8, 0)))
    assert backend.name == "flash_attn_2"


# --- rules: GPU, dtype, head dim, package

WHOLE_SAGE = SimpleNamespace(**vars(sage_2()), **vars(sage_2pp(right, granularity=None)["sageattention"]))
ALL = {"sageattention": WHOLE_SAGE, "flash_attn": flash(), "flash_attn_interface": flash()}
ALL |= {**int8(right), **sage_3(right)}


@pytest.mark.parametrize(
    "capability, ready",
    [
        (None, {"sdpa"}),
        ((7, 5), {"sdpa", "int8_attention"}),
        ((8, 0), {"sdpa", "sageattn", "flash_attn_2", "int8_attention"}),
        ((8, 9), {"sdpa", "sageattn", "flash_attn_2", "int8_attention", "sageattn_2pp"}),
        ((9, 0), {"sdpa", "sageattn", "flash_attn_2", "flash_attn_3", "int8_attention"}),
        ((10, 0), {"sdpa", "sageattn", "flash_attn_2", "int8_attention", "sageattn_3"}),
        ((12, 0), {"sdpa", "sageattn", "flash_attn_2", "int8_attention", "sageattn_2pp", "sageattn_3"}),
    ],
)
def test_compute_capability(capability: tuple[int, int] | None, ready: set[str]) -> None:
    explained = {mode: reason_for(mode, SPEC, machine(capability, **ALL)) for mode in ATTENTION_MODES[1:-1]}
    assert {name for name, reason in explained.items() if reason == "ready"} == ready
    for name, reason in explained.items():
        if name not in ready:
            assert "needs an NVIDIA GPU" in reason
            assert ("the device is cpu" if capability is None else "cpu has") in reason


def test_a_cpu_has_no_capability() -> None:
    assert nvidia_capability(CPU) is None


def test_rocm_is_not_taken_for_nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert nvidia_capability(torch.device("cuda", 0)) is None


@pytest.mark.parametrize("name", ["sageattn", "flash_attn_2", "flash_attn_3"])
def test_dtype(name: str) -> None:
    where = machine((9, 0), **ALL)
    assert reason_for(name, replace(SPEC, dtype=torch.float16), where) == "ready"
    refused = reason_for(name, replace(SPEC, dtype=torch.float32), where)
    assert "computes in float16 or bfloat16, and the model runs in float32" in refused
    assert reason_for("sdpa", replace(SPEC, dtype=torch.float32), where) == "ready"


@pytest.mark.parametrize(
    "name, package, allowed, refused",
    [
        ("sageattn", sage_1, (64, 96, 128), (32, 80, 160)),
        ("sageattn", sage_2, (32, 64, 80, 128), (160,)),
        ("flash_attn_2", None, (64, 256), (264,)),
        ("flash_attn_3", None, (64, 256), (264,)),
        ("sdpa", None, (24, 128, 264), ()),
    ],
)
def test_head_dim(name: str, package: Callable[..., Any] | None, allowed: tuple[int, ...], refused: tuple[int, ...]):
    where = machine((9, 0), **(ALL | {"sageattention": package()} if package else ALL))
    for head_dim in allowed:
        assert reason_for(name, replace(SPEC, head_dim=head_dim), where) == "ready"
    for head_dim in refused:
        assert f"and the model's is {head_dim}" in reason_for(name, replace(SPEC, head_dim=head_dim), where)


def test_every_reason_is_given_at_once() -> None:
    spec = AttentionSpec(CPU, torch.float32, 160)
    reason = reason_for("sageattn", spec, machine((7, 5)))
    for part in ("8.0 or newer", "cpu has 7.5", "float32", "head dim 1 to 128", "160"):
        assert part in reason


def test_nothing_is_imported_when_the_gpu_cannot_run_it() -> None:
    def never(name: str) -> Any:
        raise AssertionError(f"{name} was imported")

    select_attention("auto", SPEC, Machine(never, lambda _device: None))


@pytest.mark.parametrize(
    "name, platform, expected",
    [
        ("sageattn", "linux", "sageattention is not installed: python -m pip install sageattention==1.0.6"),
        ("sageattn", "win32", "python -m pip install sageattention==1.0.6 triton-windows"),
        ("flash_attn_2", "linux", "python -m pip install flash-attn --no-build-isolation"),
        ("flash_attn_2", "win32", "no official Windows wheel exists"),
        ("flash_attn_3", "linux", "flash-attention.git#subdirectory=hopper"),
    ],
)
def test_a_missing_package_comes_with_its_command(name: str, platform: str, expected: str) -> None:
    with pytest.raises(AttentionUnavailable) as error:
        select_attention(name, SPEC, machine((9, 0), platform))
    assert expected in str(error.value)
    assert f"attention_mode {name} cannot run bfloat16, head dim 128, on cpu" in str(error.value)
    assert "set attention_mode to sdpa" in str(error.value)


def test_the_command_quotes_a_python_in_a_folder_with_spaces() -> None:
    assert Machine(python="C:/My AI/python.exe").pip_install("x") == '"C:/My AI/python.exe" -m pip install x'


@pytest.mark.parametrize("platform, package", [("linux", "triton"), ("win32", "triton-windows")])
def test_sage_without_triton_names_the_package_of_the_platform(platform: str, package: str) -> None:
    broken = ModuleNotFoundError("No module named 'triton'", name="triton")
    reason = reason_for("sageattn", SPEC, machine((8, 6), platform, sageattention=broken))
    assert reason == f"sageattention is installed but misses triton: python -m pip install {package}"


@pytest.mark.parametrize(
    "broken",
    [
        ImportError("DLL load failed while importing _fused: The specified module could not be found."),
        OSError("libcudart.so.12: cannot open shared object file"),
        RuntimeError("built for another CUDA"),
        AttributeError("module 'triton' has no attribute 'jit'"),
    ],
)
def test_a_broken_import_becomes_the_reason(broken: Exception) -> None:
    for name, module in [("sageattn", "sageattention"), ("flash_attn_2", "flash_attn")]:
        reason = reason_for(name, SPEC, machine(**{module: broken}))
        assert f"{type(broken).__name__}: {broken}" in reason
        assert torch.__version__ in reason
        assert "python -m pip install" in reason


def test_a_package_without_the_function_is_refused() -> None:
    assert "no function sageattn" in reason_for("sageattn", SPEC, machine(sageattention=SimpleNamespace(sageattn=None)))
    assert "no function flash_attn_func" in reason_for("flash_attn_2", SPEC, machine(flash_attn=SimpleNamespace()))


def test_an_unknown_sage_signature_is_refused() -> None:
    package = SimpleNamespace(sageattn=lambda q, k, v, layout: q)
    reason = reason_for("sageattn", SPEC, machine(sageattention=package))
    assert "unknown version" in reason
    assert "sageattention==1.0.6" in reason


# --- the probe


def raises(error: Exception) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise error

    return function


def wrong_for_other_lengths(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return right(q, k, v) if q.shape[1] == k.shape[1] else torch.zeros_like(q)


def overwrites(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = right(q, k, v)
    k.zero_()
    return out


WRONG: list[tuple[str, Callable[..., Any], str]] = [
    ("black", lambda q, k, v: torch.zeros_like(q), "differs from plain attention"),
    ("unscaled", lambda q, k, v: right(q * q.shape[-1] ** 0.5, k, v), "differs from plain attention"),
    ("other heads", lambda q, k, v: right(q, k, v).flip(2), "differs from plain attention"),
    ("nan", lambda q, k, v: torch.full_like(q, torch.nan), "NaN or infinity"),
    ("one infinity", lambda q, k, v: right(q, k, v).index_fill(1, torch.tensor([7]), torch.inf), "NaN or infinity"),
    ("shape", lambda q, k, v: right(q, k, v).flatten(2), "instead of bfloat16 [1, 256, 2, 128]"),
    ("dtype", lambda q, k, v: right(q, k, v).float(), "returns float32"),
    ("nothing", lambda q, k, v: None, "AttributeError"),
    ("cross lengths", wrong_for_other_lengths, "q length 256, k length 128"),
    ("in place", overwrites, "overwrites its inputs"),
    ("launch", raises(RuntimeError("no kernel image is available for execution on the device")), "no kernel image"),
    ("arch", raises(ValueError("Unsupported CUDA architecture: sm75")), "Unsupported CUDA architecture"),
    ("assertion", raises(AssertionError()), "fails on cpu (AssertionError)"),
]


@pytest.mark.parametrize("function, expected", [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
@pytest.mark.parametrize("name, module", [("sageattn", "sageattention"), ("flash_attn_2", "flash_attn")])
def test_the_probe_refuses(name: str, module: str, function: Callable[..., Any], expected: str) -> None:
    package = sage_2(function) if name == "sageattn" else flash(function)
    where = machine(**{module: package})
    with pytest.raises(AttentionUnavailable, match="set attention_mode to sdpa") as error:
        select_attention(name, SPEC, where)
    assert expected in str(error.value)
    assert select_attention("auto", SPEC, where).name == "sdpa"


def test_the_probe_survives_tritons_own_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    class TritonError(Exception):
        pass

    monkeypatch.setitem(sys.modules, "triton.errors", SimpleNamespace(TritonError=TritonError))  # type: ignore[arg-type]
    reason = reason_for("sageattn", SPEC, machine(sageattention=sage_2(raises(TritonError("at 12:8: type mismatch")))))
    assert "TritonError: at 12:8: type mismatch" in reason


def test_quantisation_noise_passes_for_sage_only() -> None:
    def noisy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = plain_attention(q, k, v)
        noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(8), dtype=out.dtype)
        return (out + 0.03 * noise * out.norm() / noise.norm()).to(q.dtype)

    where = machine(sageattention=sage_2(noisy), flash_attn=flash(noisy))
    assert reason_for("sageattn", SPEC, where) == "ready"
    assert "differs from plain attention by 3." in reason_for("flash_attn_2", SPEC, where)


def test_the_probe_leaves_the_users_seed_alone() -> None:
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    select_attention("auto", SPEC)
    assert torch.equal(torch.rand(1), expected)


def test_every_selection_probes_afresh() -> None:
    calls: list[dict[str, Any]] = []
    where = machine(sageattention=sage_2(calls=calls))
    first = select_attention("sageattn", SPEC, where)
    num_calls = len(calls)
    assert num_calls > 0
    assert select_attention("sageattn", SPEC, where) is not first
    assert len(calls) == 2 * num_calls


# --- the choice


@pytest.mark.parametrize(
    "capability, packages, chosen",
    [
        ((9, 0), ALL, "flash_attn_3"),
        ((9, 0), {"flash_attn": flash()}, "flash_attn_2"),
        ((8, 9), ALL, "flash_attn_2"),
        ((8, 9), {"sageattention": sage_2()}, "sdpa"),
        ((7, 5), ALL, "sdpa"),
        (None, ALL, "sdpa"),
    ],
)
def test_auto_takes_the_best_exact_backend(
    capability: tuple[int, int] | None, packages: dict[str, SimpleNamespace], chosen: str
) -> None:
    backend = select_attention("auto", SPEC, machine(capability, **packages))
    assert backend.name == chosen
    assert backend.exact


def test_auto_logs_the_choice_once_with_every_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        select_attention("auto", SPEC, machine((8, 9)))
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    print(message)
    for part in (
        "auto chose sdpa for bfloat16, head dim 128, on cpu",
        "sageattn: quantised",
        "flash_attn_2: flash_attn is not installed",
        "flash_attn_3: needs an NVIDIA GPU of compute capability 9.0",
    ):
        assert part in message


def test_auto_says_what_it_did_not_need(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        select_attention("auto", SPEC, machine((9, 0), **ALL))
    assert "flash_attn_2: comes after it; sdpa: comes after it" in caplog.text


def test_auto_with_nothing_left_lists_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("No available kernel")

    monkeypatch.setattr(Sdpa, "attend", broken)
    with pytest.raises(AttentionUnavailable) as error:
        select_attention("auto", SPEC, machine((8, 9)))
    for part in (
        "sdpa: fails on cpu (RuntimeError: No available kernel)",
        "flash_attn_2:",
        "flash_attn_3:",
        "sageattn:",
    ):
        assert part in str(error.value)
    with pytest.raises(AttentionUnavailable) as error:
        select_attention("sdpa", SPEC, machine(None))
    assert "set attention_mode to sdpa" not in str(error.value)


def test_an_unknown_mode_lists_the_allowed_ones() -> None:
    with pytest.raises(AttentionUnavailable) as error:
        select_attention("xformers", SPEC)
    assert "'xformers' does not exist" in str(error.value)
    assert "auto, sdpa, sageattn, flash_attn_2, flash_attn_3" in str(error.value)
    assert isinstance(error.value, ValueError)


def test_modes_keep_the_order_saved_workflows_know() -> None:
    old = ("auto", "sdpa", "sageattn", "flash_attn_2", "flash_attn_3")
    assert (*old, "int8_attention", "sageattn_2pp", "sageattn_3", "auto_fast") == ATTENTION_MODES


def test_names_and_exactness_agree_with_the_table() -> None:
    exact = (Sdpa, FlashAttention2, FlashAttention3)
    inexact = (Int8Attention, SageAttention2pp, SageAttention3)
    in_order = (Sdpa, SageAttention, FlashAttention2, FlashAttention3, *inexact)
    for mode, backend in zip(ATTENTION_MODES[1:-1], in_order, strict=True):
        assert backend.name == mode
        assert backend.exact == (backend in exact)


def test_importing_loads_no_kernels_and_touches_no_cuda() -> None:
    code = (
        "import sys, torch, lowvram_video.attention.select; "
        "kernels = {'flash_attn', 'flash_attn_interface', 'sageattention', 'sageattn3', 'comfy_kitchen', 'triton'}; "
        "print(kernels & set(sys.modules), "
        "torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set() False"


# --- on a real GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_runs_what_it_calls_ready() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    for dtype in (torch.bfloat16, torch.float16):
        spec = AttentionSpec(device, dtype, 128)
        for name in ATTENTION_MODES[1:-1]:
            reason = reason_for(name, spec, THIS_MACHINE)
            print(f"{spec}: {name}: {reason}")
            if reason != "ready":
                continue
            backend = select_attention(name, spec)
            wide = torch.randn(2, 640, 6, 128, generator=torch.Generator().manual_seed(10)).to(device, dtype)
            for k_length in (640, 512, 257):
                q, k, v = wide[:, :, 0:2], wide[:, :k_length, 2:4], wide[:, :k_length, 4:6]
                error = relative_error(backend.attend(q, k, v), plain_attention(q, k, v))
                print(f"  k length {k_length}: relative error {error:.2e}")
                assert error < (1e-2 if backend.exact else 5e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sdpa_never_waits_for_the_gpu() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    backend = select_attention("sdpa", AttentionSpec(device, torch.bfloat16, 128))
    q = torch.randn(1, 512, 4, 128, device=device, dtype=torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        backend.attend(q, q, q)
    finally:
        torch.cuda.set_sync_debug_mode("default")
