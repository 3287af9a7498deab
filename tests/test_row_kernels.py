"""The Triton kernels of fp8 and int8 layers against their references: interpreted on the CPU, and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from lowvram_video.system.triton_errors import triton_errors
from lowvram_video.weights.kernels.gemms import Fp8Rescaled, Int8Product, gemm_error, select_fp8_gemm, select_int8_gemm
from lowvram_video.weights.kernels.row_reference import TorchRowOps
from lowvram_video.weights.kernels.rows import select_row_ops
from lowvram_video.weights.linear.compute import select_compute
from lowvram_video.weights.linear.fp8 import Fp8Matmul
from lowvram_video.weights.linear.linear import Linear
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_rows(device: str, fp8: bool) -> None:
    from lowvram_video.weights.kernels.rows import TritonRowOps

    ops, reference = TritonRowOps(fp8=fp8), TorchRowOps()
    codes = torch.arange(256, dtype=torch.uint8, device=device).repeat(3, 1)
    for dtype in (torch.int8, E4M3, E5M2):
        values = codes.view(dtype)
        for scales in (None, torch.tensor([0.37], device=device), torch.tensor([[0.1], [1.0], [1e-3]], device=device)):
            got, want = (
                each.dequantize(values, scales, torch.empty(3, 256, device=device)) for each in (ops, reference)
            )
            finite = torch.isfinite(want)
            assert torch.equal(got[finite], want[finite]), dtype
    wide = rand(7, 400).to(device)
    x = wide[:, :200] * torch.exp(3 * rand(7, 1, seed=1)).to(device)  # rows of a wider buffer
    x[3] = 0
    for name in (torch.int8, E4M3):
        (got, got_scales), (want, want_scales) = (each.quantize(x, name) for each in (ops, reference))
        assert got.dtype == want.dtype and torch.equal(got_scales, want_scales), name
        different = got.float() != want.float()
        if device == "cpu" and got.dtype == E4M3:
            # Triton 3.6's interpreter loses the carry when a mantissa rounds up to the next power of two
            different &= 2 * got.float() != want.float()
        print(f"{device} {name}: {int(different.sum())} of {got.numel()} differ")
        assert not different.any(), name
    product = torch.randint(-(2**20), 2**20, (7, 200), dtype=torch.int32, device=device)
    rows, columns, bias = (rand(*s, seed=5).to(device) for s in ((7, 1), (200,), (200,)))
    for each in (bias, None):
        out, want = (
            o.rescale(product, rows, columns, each, torch.empty(7, 200, device=device)) for o in (ops, reference)
        )
        error = float((out - want).abs().max() / want.abs().max())
        print(f"{device} rescale: {error:.1e}")
        assert error < 1e-6


def check_int8_gemm(device: str) -> None:
    from lowvram_video.weights.kernels.gemms import TILES, Int8Triton
    from lowvram_video.weights.kernels.tile import Tile

    tiles = (Tile(16, 32, 32, 4, 2),) if device == "cpu" else TILES
    for tile in tiles:
        for columns in (64, 72):
            try:
                error = gemm_error(Int8Triton(tile), torch.int8, torch.device(device), columns=columns)
            except triton_errors() as problem:
                assert device == "cuda" and "shared memory" in str(problem)
                continue
            print(f"{device} {tile}, {columns} columns: {error:.1e}")
            assert error < (1e-6 if device == "cpu" else 5e-3)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's wheels are for Linux")
def test_triton_interpreted_on_the_cpu() -> None:
    # the interpreter is chosen when kernels are defined: a process of its own
    code = f"import sys, torch; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_row_kernels as t; "
    code += "t.check_rows('cpu', True); t.check_int8_gemm('cpu')"
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)


@pytest.mark.gpu
@needs_gpu
def test_rows_on_the_gpu() -> None:
    check_rows("cuda", torch.cuda.get_device_capability() >= (8, 9))
    assert select_row_ops(torch.device("cuda")).name == "triton"


@pytest.mark.gpu
@needs_gpu
def test_int8_products_on_the_gpu() -> None:
    device = torch.device("cuda")
    check_int8_gemm("cuda")
    ops = select_row_ops(device)
    for gemm in (Int8Product(ops), Int8Product(TorchRowOps()), select_int8_gemm(device, ops)):
        for rows in (1, 16, 48):
            error = gemm_error(gemm, torch.int8, device, num_rows=rows)
            print(f"{gemm.name}, {rows} rows: {error:.1e}")
            assert error < 5e-3


@pytest.mark.gpu
@needs_gpu
def test_fp8_products_on_the_gpu() -> None:
    device = torch.device("cuda")
    ops = select_row_ops(device)
    if torch.cuda.get_device_capability() < (8, 9):
        with pytest.raises(ValueError, match="compute capability"):
            select_fp8_gemm(device, ops)
        return
    for gemm in (select_fp8_gemm(device, ops), Fp8Rescaled(ops)):
        for rows in (1, 16, 48):
            error = gemm_error(gemm, E4M3, device, num_rows=rows)
            print(f"{gemm.name}, {rows} rows: {error:.1e}")
            assert error < 1e-2
    packed = {"weight": rand(64, 96).to(device, E4M3), "weight_scale": torch.ones(1, device=device)}
    for gemm in (select_fp8_gemm(device, ops), Fp8Rescaled(ops)):
        project = Fp8Matmul(gemm, ops).prepare(packed, None, torch.float16, None)
        out = project(rand(20, 96).to(device, torch.float16))
        assert out.dtype == torch.float16 and torch.isfinite(out).all()


@pytest.mark.gpu
@needs_gpu
def test_a_layer_chosen_for_the_gpu() -> None:
    device = torch.device("cuda")
    layer = Linear(256, 128, device=device, dtype=torch.bfloat16)
    weight = rand(128, 256).to(device) / 16
    layer.bias.data.zero_()
    layer.weight = torch.nn.Parameter(weight.to(E4M3), requires_grad=False)
    if torch.cuda.get_device_capability() >= (8, 9):
        select_compute(layer, [layer], "fp8_fast", device)
        x = rand(100, 256).to(device, torch.bfloat16)
        want = x.double() @ weight.double().t()
        error = float((layer(x).double() - want).norm() / want.norm())
        print(f"fp8 layer: {error:.3f}")
        assert error < 0.06
