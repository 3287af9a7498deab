"""The choice of kernels: what is tried, what is raised, what is kept; GPUs are played by the CPU."""

from __future__ import annotations

import gc
import logging
import sys
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lowvram_video.attention.backend import AttentionSpec
from lowvram_video.attention.select import AttentionUnavailable, select_attention
from lowvram_video.fused.eager import EagerOps
from lowvram_video.fused.select import select_fused_ops
from lowvram_video.memory.plan import limits, rates
from lowvram_video.system.kernel_choice import Trial, choose, cuda_seconds, reason_against
from lowvram_video.weights.kernels import gemms, gguf_op, low_rank_ops, low_rank_reference
from lowvram_video.weights.kernels.row_reference import TorchRowOps
from lowvram_video.weights.linear import compute, kitchen
from lowvram_video.weights.linear.fp8 import Fp8Dequantized, Fp8Matmul
from lowvram_video.weights.linear.int8 import Int8Dequantized, Int8Matmul
from lowvram_video.weights.linear.linear import Linear
from lowvram_video.weights.linear.projection import DenseProjection
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .test_attention import flash, machine, right, sage_2

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SPEC = AttentionSpec(CPU, torch.bfloat16, 128)

Maker = Callable[[], Exception]


def allocator() -> Exception:
    return torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")


def driver() -> Exception:
    return RuntimeError("Triton Error [CUDA]: out of memory")


def own_fault() -> Exception:
    return TypeError("launch_down() missing 1 required positional argument: 'num_stages'")


SHORTAGES = pytest.mark.parametrize("shortage", [allocator, driver])


class OnTheCpu(TorchFunctionMode):
    """Tensors that are asked for on a GPU are made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def here(value: Any) -> Any:
            return CPU if isinstance(value, torch.device) else value

        return func(*map(here, args), **{name: here(value) for name, value in (kwargs or {}).items()})


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A GPU of capability 9.0 that is the CPU; nothing chosen before the test or in it stays chosen."""

    class Event:
        def __init__(self, **_: object) -> None: ...

        def record(self) -> None: ...

        def elapsed_time(self, other: object) -> float:
            return 1.0

    make = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda *_: make())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name, value in (
        ("synchronize", None), ("empty_cache", None), ("get_device_capability", (9, 0)), ("is_bf16_supported", True),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    with OnTheCpu():
        yield monkeypatch


class Failing:
    """Raises while `error` is set, and counts; else it does as `does`."""

    def __init__(self, error: Maker | None, does: Callable[..., Any] = lambda *_: None):
        self.error, self.does, self.calls = error, does, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.error is not None:
            raise self.error()
        return self.does(*args, **kwargs)


# --- an out-of-memory is no answer, and not kept ---------------------------------------------------------


@SHORTAGES
def test_gguf_is_tried_again(shortage: Maker, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    run = Failing(shortage, gguf_op.dequantize_in_chunks)
    monkeypatch.setattr(gguf_op, "_run_triton", run)
    device = torch.device("cpu", 1 + (shortage is driver))  # a key of its own in the cache
    monkeypatch.setattr(Tensor, "to", lambda x, *args, to=Tensor.to: x if args == (device,) else to(x, *args))
    with caplog.at_level(logging.INFO):
        assert not gguf_op.triton_agrees("Q4_0", device)
    assert "Triton cannot" not in caplog.text and "no memory left" in caplog.text
    run.error = None
    assert gguf_op.triton_agrees("Q4_0", device)
    calls = run.calls
    assert gguf_op.triton_agrees("Q4_0", device) and run.calls == calls, "what works is known for good"


@SHORTAGES
def test_what_ran_out_of_memory_leaves_nothing_on_the_device(shortage: Maker) -> None:
    """The error is kept until the choice is made, but not what was made for the trial."""
    made: list[weakref.ref[Tensor]] = []

    def check(ops: Any) -> str | None:
        probe = torch.zeros(4)
        made.append(weakref.ref(probe))
        raise shortage()

    gc.disable()
    try:
        assert not choose(Trial("a step", CPU, check), [EagerOps()], EagerOps()).is_final
        assert [ref() for ref in made] == [None]
    finally:
        gc.enable()


class TritonLike(low_rank_reference.TorchLowRankOps):
    name = "kernel"


class FakeProbe(low_rank_ops.Probe):
    """No larger than it must be; timing it says that kernels are twice as fast."""

    errors: Maker | None = None  # of the constructor
    timing: Maker | None = None

    def __init__(self, device: torch.device, rank: int, num_rows: int, features: int):
        if FakeProbe.errors is not None:
            raise FakeProbe.errors()
        super().__init__(device, 4, 8, 16)

    def seconds(self, step: Any, ops: Any, *_: Any) -> float:
        if FakeProbe.timing is not None:
            raise FakeProbe.timing()
        return 1.0 if ops.name == "kernel" else 2.0


@pytest.fixture
def low_rank(gpu: pytest.MonkeyPatch) -> Iterator[Callable[[int], Any]]:
    """Chooses for a GPU of this number, with one Triton kernel."""
    pytest.importorskip("triton")
    name = "lowvram_video.weights.kernels.low_rank"
    gpu.setitem(sys.modules, name, SimpleNamespace(CANDIDATES=(TritonLike(),)))  # type: ignore[arg-type]
    gpu.setattr(low_rank_ops, "Probe", FakeProbe)
    yield lambda number: low_rank_ops.select_low_rank_ops(torch.device("cuda", number))
    FakeProbe.errors = FakeProbe.timing = None


@SHORTAGES
@pytest.mark.parametrize("where", ["errors", "timing"])
def test_low_rank_products_are_tried_again(shortage: Maker, where: str, low_rank: Any, caplog: Any) -> None:
    number = 10 + ["errors", "timing"].index(where) + 2 * (shortage is driver)
    setattr(FakeProbe, where, shortage)
    ops = low_rank(number)
    x, down = torch.ones(3, 16), torch.ones(2, 16)
    assert ops.project_down(x, down, torch.ones(2)).tolist() == [[16.0] * 2] * 3
    assert "cannot be used" not in caplog.text
    setattr(FakeProbe, where, None)
    chosen = low_rank(number)
    assert isinstance(chosen, low_rank_ops.ChosenLowRankOps)
    assert {chosen.choices[0].down.name, chosen.choices[1].up.name} == {"kernel"}
    assert low_rank(number) is chosen


@SHORTAGES
def test_gelu_in_the_product_is_tried_again(shortage: Maker, gpu: pytest.MonkeyPatch) -> None:
    def epilogue(bias: Tensor, x: Tensor, weight: Tensor, use_gelu: bool, out: Tensor) -> None:
        out.copy_(torch.nn.functional.gelu(torch.addmm(bias, x, weight).float(), approximate="tanh"))

    run = Failing(shortage, epilogue)
    gpu.setattr(torch, "_addmm_activation", run)
    device = torch.device("cuda", 20 + (shortage is driver))
    assert not gemms.fuses_gelu(device)
    run.error = None
    assert gemms.fuses_gelu(device)


class Elementwise(EagerOps):
    name = "triton"


@SHORTAGES
def test_elementwise_steps_are_tried_again(shortage: Maker, gpu: pytest.MonkeyPatch, caplog: Any) -> None:
    steps = Elementwise()
    gelu = Failing(shortage, steps.gelu_)
    steps.gelu_ = gelu  # type: ignore[method-assign]
    gpu.setitem(sys.modules, "lowvram_video.fused.triton_ops", SimpleNamespace(TritonOps=lambda _: steps))  # type: ignore[arg-type]
    with caplog.at_level(logging.INFO):
        assert select_fused_ops(CUDA).name == "eager"
    assert "cannot be used" not in caplog.text and "no memory left" in caplog.text
    gelu.error = None
    assert select_fused_ops(CUDA).name == "triton"


@SHORTAGES
def test_attention_runs_by_sdpa_for_now(shortage: Maker, caplog: Any) -> None:
    def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise shortage()

    where = machine(sageattention=sage_2(full), flash_attn=flash(full))
    for mode in ("sageattn", "flash_attn_2", "auto"):
        backend = select_attention(mode, SPEC, where)
        assert backend.name == "sdpa"
        q = torch.randn(1, 5, 2, 128).bfloat16()
        assert torch.allclose(backend.attend(q, q, q), right(q, q, q), atol=2e-2)
    assert "update it" not in caplog.text
    assert select_attention("flash_attn_2", SPEC, machine(flash_attn=flash())).name == "flash_attn_2"


# --- full cards fail no loader and no plan ---------------------------------------------------------------


class Product(gemms.ReferenceGemm):
    """A product that is right, under a name."""

    def __init__(self, name: str):
        super().__init__(name)


@SHORTAGES
def test_without_room_to_time_the_first_product_that_is_right_runs(shortage: Maker, gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(gemms, "gemm_seconds", Failing(shortage))
    assert gemms._fastest([Product("first"), Product("second")], torch.int8, CUDA).name == "first"


def layer_of(dtype: torch.dtype) -> Linear:
    layer = Linear(32, 32)
    layer.weight = torch.nn.Parameter(torch.ones(32, 32).to(dtype), requires_grad=False)
    layer.register_buffer("weight_scale", torch.ones(32, 1))
    layer.format = Fp8Dequantized() if dtype.is_floating_point else Int8Dequantized()
    return layer


@SHORTAGES
@pytest.mark.parametrize("quantization", ["fp8_fast", "int8"])
def test_eight_bit_layers_are_unpacked_for_now(
    quantization: str, shortage: Maker, gpu: pytest.MonkeyPatch, caplog: Any
) -> None:
    dtype = torch.float8_e4m3fn if quantization == "fp8_fast" else torch.int8
    layer = layer_of(dtype)
    gpu.setattr(compute, "select_row_ops", lambda device: TorchRowOps())
    gpu.setattr(compute, "fuses_gelu", lambda device: False)
    gpu.setattr(gemms.ReferenceGemm, "__call__", Failing(shortage))
    compute.select_compute(layer, [layer], quantization, CUDA)
    assert isinstance(layer.format, Fp8Dequantized | Int8Dequantized)
    assert "no memory left" in caplog.text
    gpu.undo()
    compute.select_compute(layer, [layer], quantization, CPU)
    assert isinstance(layer.format, Fp8Matmul | Int8Matmul)


@SHORTAGES
def test_a_card_too_full_to_be_timed_is_planned_for(shortage: Maker, gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(rates, "cuda_seconds", Failing(shortage))
    gpu.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 8 * 2**30))
    found = limits.limits_for(CUDA, vram_budget_gib=4.0)
    assert found.vram_budget_bytes == 4 * 2**30
    assert found.tflops_matmul == limits.Limits(0).tflops_matmul


# --- our own faults: "not usable here" while trying, raised afterwards -----------------------------------


def test_a_fault_while_a_kernel_is_tried_leaves_the_slower_path(low_rank: Any, caplog: Any) -> None:
    class Broken(TritonLike):
        def project_down(self, x: Tensor, down: Tensor, scale: Tensor) -> Tensor:
            raise own_fault()

        def add_up_(self, y: Tensor, hidden: Tensor, up: Tensor, gelu_: low_rank_reference.Gelu | None = None) -> None:
            raise own_fault()

    sys.modules["lowvram_video.weights.kernels.low_rank"].CANDIDATES = (Broken(),)
    with caplog.at_level(logging.INFO):
        chosen = low_rank(30)
    assert chosen.choices[0].down is low_rank_reference.TORCH
    assert "missing 1 required positional argument" in caplog.text


def test_a_fault_after_it_was_proven_is_raised(low_rank: Any) -> None:
    FakeProbe.timing = own_fault
    with pytest.raises(TypeError, match="num_stages"):
        low_rank(31)


def test_a_fault_while_layers_are_timed_is_raised(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(compute, "kitchen_int8_available", lambda: True)
    same = lambda self, packed, bias, dtype, scratch: Int8Matmul().prepare(packed, bias, dtype, scratch)  # noqa: E731
    gpu.setattr(kitchen.KitchenInt8, "prepare", same)
    gpu.setattr(compute, "layer_seconds", Failing(own_fault))
    with pytest.raises(TypeError, match="num_stages"):
        compute._faster(Int8Matmul(), CUDA)


def test_comfy_kitchens_product_is_compared_before_it_is_used(gpu: pytest.MonkeyPatch, caplog: Any) -> None:
    def wrong(self: object, packed: Any, bias: Tensor, dtype: torch.dtype, scratch: object) -> DenseProjection:
        return DenseProjection(torch.ones(packed["weight"].shape, dtype=dtype), bias)

    gpu.setattr(compute, "kitchen_int8_available", lambda: True)
    gpu.setattr(kitchen.KitchenInt8, "prepare", wrong)
    gpu.setattr(compute, "layer_seconds", lambda form, device: 1.0 if isinstance(form, Int8Matmul) else 0.5)
    with caplog.at_level(logging.INFO):
        assert isinstance(compute._faster(Int8Matmul(), CUDA), Int8Matmul)
    assert "differs from the reference by" in caplog.text


# --- what is said ----------------------------------------------------------------------------------------


def test_a_wrong_kernel_is_refused_with_numbers(gpu: pytest.MonkeyPatch, caplog: Any) -> None:
    class Wrong(Elementwise):
        def gelu_(self, x: Tensor) -> None:
            x.zero_()

    gpu.setitem(sys.modules, "lowvram_video.fused.triton_ops", SimpleNamespace(TritonOps=lambda _: Wrong()))  # type: ignore[arg-type]
    assert select_fused_ops(CUDA).name == "eager"
    assert len(caplog.records) == 1
    text = caplog.records[0].getMessage()
    assert "elementwise steps: auto chose eager for cuda:0" in text
    assert "triton: differs from the reference by" in text and "(allowed 2e-02)" in text


def test_gguf_is_refused_with_numbers(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def slightly(packed: Tensor, out: Tensor, quant: str) -> None:
        gguf_op.dequantize_in_chunks(packed, out, quant)
        out.mul_(1.25)

    monkeypatch.setattr(gguf_op, "_run_triton", slightly)
    assert not gguf_op.triton_agrees("Q5_0", CPU)
    assert "differs from the reference by 2.5e-01 (allowed 0e+00)" in caplog.text


def test_every_reason_is_given_where_nothing_can_run(gpu: pytest.MonkeyPatch) -> None:
    class Wrong(Product):
        def __call__(self, rows: Any, weight: Tensor, columns: Tensor, bias: Tensor | None, out: Tensor) -> None:
            out.zero_()

    class Unknown(Product):
        def __call__(self, rows: Any, weight: Tensor, columns: Tensor, bias: Tensor | None, out: Tensor) -> None:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    with pytest.raises(
        ValueError, match=r"first: differs from the reference by 1.0e\+00.*second: fails.*NOT_SUPPORTED"
    ):
        gemms._fastest([Wrong("first"), Unknown("second")], torch.int8, CUDA)


def test_an_explicit_choice_that_is_wrong_is_refused_even_on_a_full_card() -> None:
    where = machine(flash_attn=flash(lambda q, k, v: torch.zeros_like(q)))
    with pytest.raises(AttentionUnavailable, match="differs from plain attention"):
        select_attention("flash_attn_2", SPEC, where)


# --- on the card that is meant ----------------------------------------------------------------------------


@pytest.fixture
def current(gpu: pytest.MonkeyPatch) -> list[torch.device]:
    """The current device, last; it is the first card's until somebody says otherwise."""
    devices = [CUDA]

    class Current:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            devices.append(self.device)

        def __exit__(self, *_: object) -> None:
            devices.pop()

    gpu.setattr(torch.backends.cuda, "is_built", lambda: True)
    gpu.setattr(torch.cuda, "is_available", lambda: True)
    gpu.setattr(torch.cuda, "device", Current)
    return devices


def test_kernels_are_tried_and_timed_on_the_card_that_is_meant(current: list[torch.device]) -> None:
    """Triton launches on the current device: a second card's kernels failed there, or ran on the first one."""
    second, seen = torch.device("cuda", 1), []

    def look(what: str) -> None:
        seen.append((what, current[-1]))

    class Way:
        name = "a way"

    trial: Trial[Way] = Trial("steps", second, lambda _: look("checked"), lambda _: look("timed") or 1.0)  # type: ignore[func-returns-value]
    choose(trial, [Way(), Way()])
    reason_against(lambda: look("compared"), second)
    cuda_seconds(lambda: look("called"), second, before=lambda: look("before"), repeats=1)
    assert {what for what, _ in seen} == {"checked", "timed", "compared", "called", "before"}
    assert {device for _, device in seen} == {second}
    assert current == [CUDA]
