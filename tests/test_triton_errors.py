"""A broken Triton, in every way in which it is seen to break, leaves the slower path and one line in the log."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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


# Each in a process of its own, where Triton is a package that raises this when it is imported
BROKEN = {
    "another CUDA": "raise OSError('libcudart.so.11.0: cannot open shared object file')",
    "another Python": "def kernel(:",
    "a leftover": "",
}
USES = """
import sys

import torch
from lowvram_video.cli.main import main
from lowvram_video.compilation.blocks import compile_modules
from lowvram_video.compilation.settings import CompileSettings
from lowvram_video.system.torch_compiler import outside_graphs

assert "triton" not in sys.modules and "torch._dynamo" not in sys.modules, "what may be broken is not needed"
assert outside_graphs(print) is print
try:
    compile_modules([torch.nn.Linear(1, 1)], CompileSettings())
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", BROKEN)
def test_everything_but_compiling_goes_without(kind: str, tmp_path: Path) -> None:
    """torch's own compiler catches an absent Triton alone."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(BROKEN[kind])
    places = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    ended = subprocess.run(
        [sys.executable, "-c", USES],
        env=os.environ | {"PYTHONPATH": places},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "cannot compile here" in ended.stdout and "doctor" in ended.stdout and "\n" not in ended.stdout.strip()
