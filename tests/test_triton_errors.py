"""A broken Triton, in every way in which it is seen to break, leaves the slower path and one line in the log."""

import logging
import subprocess
from collections.abc import Callable

import pytest
import torch
from lowvram_video.fused import select as fused
from lowvram_video.system.kernel_choice import brief
from lowvram_video.system.triton_errors import triton_errors
from lowvram_video.weights.kernels import gemms, gguf_op, low_rank_ops, rows
from lowvram_video.weights.kernels.row_reference import QuantizedRows
from torch import Tensor

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def no_header() -> Exception:
    """gcc does not find Python.h."""
    return subprocess.CalledProcessError(1, ["gcc", "main.c", "-I/usr/include/python3.12"])


def no_compiler() -> Exception:
    errors = pytest.importorskip("triton.compiler.errors")
    return errors.CompilationError("def kernel(): ...", None, "type fp8e4nv not supported in this architecture")


def no_memory() -> Exception:
    errors = pytest.importorskip("triton.runtime.errors")
    return errors.OutOfResources(232448, 101376, "shared memory")


BREAKS = pytest.mark.parametrize("error", [no_header, no_compiler, no_memory, AssertionError, KeyError])


def failing(error: Callable[[], Exception]) -> Callable[..., object]:
    def fail(*_: object, **__: object) -> object:
        raise error()

    return fail


@BREAKS
def test_all_of_them_are_caught(error: Callable[[], Exception]) -> None:
    problem = error()
    assert isinstance(problem, triton_errors())


@BREAKS
def test_the_eager_path_is_taken(
    error: Callable[[], Exception], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    for module in (fused, rows):
        monkeypatch.setattr(module, "_disagreement", failing(error))
    assert fused.select_fused_ops(CUDA).name == "eager"
    assert rows.select_row_ops(CUDA).name == "torch"
    monkeypatch.setattr(low_rank_ops, "_triton", failing(error))
    assert low_rank_ops.select_low_rank_ops.__wrapped__(CUDA).best is low_rank_ops.TORCH
    failures = ("triton: fails on cuda:0", "triton: fails on cuda:0", "Triton cannot be used")
    for record, failure in zip(caplog.records, failures, strict=True):
        assert f"{failure} ({brief(error())})" in record.message


@BREAKS
def test_gguf_is_unpacked_by_torch(
    error: Callable[[], Exception], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gguf_op, "_run_triton", failing(error))
    chosen = gguf_op.triton_agrees.__wrapped__("Q8_0", CPU)
    assert not chosen.best and chosen.is_final
    assert "unpacking Q8_0: auto chose PyTorch (slower)" in caplog.text


@BREAKS
def test_another_product_is_chosen(error: Callable[[], Exception], caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        name = "broken"

        def __call__(
            self, rows: QuantizedRows, weight: Tensor, columns: Tensor, bias: Tensor | None, out: Tensor
        ) -> None:
            failing(error)()

    with caplog.at_level(logging.INFO):
        assert gemms._fastest([Broken(), gemms.ReferenceGemm()], torch.int8, CPU).name == "reference"
