"""Elementwise steps against their formulas; the Triton kernels against the eager reference."""

import os
import subprocess
import sys

import pytest
import torch
from lowvram_video.fused.eager import EagerOps
from lowvram_video.fused.ops import NormedRows, Rope
from lowvram_video.fused.select import select_fused_ops
from lowvram_video.weights.kernels.row_reference import LARGEST, SMALLEST_SCALE, TorchRowOps
from torch.nn import functional as F


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def test_modulated_norm_takes_each_rows_group() -> None:
    x, shift, scale = rand(7, 12), rand(3, 12, seed=1), rand(3, 12, seed=2)
    got = EagerOps().modulated_norm(x, shift, scale, 2, 4, 1e-6)
    for row in range(7):
        group = (2 + row) // 4
        want = F.layer_norm(x[row], (12,), eps=1e-6) * (1 + scale[group]) + shift[group]
        torch.testing.assert_close(got[row], want)


def test_rotation_is_complex_multiplication_per_head() -> None:
    x, weight, angle = rand(10, 16), rand(16, seed=1), rand(5, 4, seed=2)
    got = x.clone()
    EagerOps().rms_norm_(got, weight, 1e-6, Rope(angle.cos(), angle.sin()), 3)
    normed = F.rms_norm(x, (16,), weight, 1e-6)
    turn = torch.polar(torch.ones_like(angle), angle)[torch.arange(3, 13) % 5]  # rows of two samples of 5 tokens
    want = torch.view_as_real(torch.view_as_complex(normed.view(10, 2, 4, 2)) * turn[:, None]).reshape(10, 16)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("rotate", [False, True])
def test_a_short_weight_normalises_head_by_head(rotate: bool) -> None:
    x, weight, angle = rand(10, 24), rand(8, seed=1), rand(12, 4, seed=2)
    got = x.clone()
    EagerOps().rms_norm_(got, weight, 1e-6, Rope(angle.cos(), angle.sin()) if rotate else None, 2)
    want = F.rms_norm(x.view(10, 3, 8), (8,), weight, 1e-6)
    if rotate:
        turn = torch.polar(torch.ones_like(angle), angle)[2:12, None]
        want = torch.view_as_real(torch.view_as_complex(want.view(10, 3, 4, 2)) * turn).reshape(10, 3, 8)
    torch.testing.assert_close(got, want.reshape(10, 24))


def check_packing(device: str, dtype: torch.dtype) -> None:
    """The kernels pack the same bits as the reference, and unpack heads out of wider rows."""
    from lowvram_video.fused.triton_ops import TritonOps

    heads, dim = 5, 12
    x = rand(19, heads, dim, dtype=dtype, device=device) * torch.exp(2 * rand(19, heads, 1, seed=1)).to(device, dtype)
    x[3, 2] = 0
    packed = []
    for ops in (TritonOps(), EagerOps()):
        values = torch.full((19, heads, dim), 99, dtype=torch.int8, device=device)
        scales = torch.empty(19, heads, device=device)
        ops.pack_heads(x, values, scales)
        out = torch.empty(19, 3, dim, dtype=dtype, device=device)
        ops.unpack_heads(values[:, 1:4], scales[:, 1:4], out)
        packed.append((values, scales, out))
    for got, want in zip(*packed, strict=True):
        assert torch.equal(got, want)


def check_normed_packing(device: str, dtype: torch.dtype, heads: int, head_dim: int) -> None:
    """One kernel packs the same bits as the two that norm and pack one after the other, with and without rotation."""
    from lowvram_video.fused.triton_ops import TritonOps

    ops, dim = TritonOps(), heads * head_dim
    x, weight = rand(7, dim, dtype=dtype, device=device), rand(dim, seed=1, dtype=dtype, device=device)
    x[2] = 0
    angle = rand(5, head_dim // 2, seed=2, device=device)
    for rope in (None, Rope(angle.cos(), angle.sin())):
        values = torch.full((2, 7, heads, head_dim), 99, dtype=torch.int8, device=device)
        scales = torch.empty(2, 7, heads, device=device)
        ops.pack_normed(x.clone(), weight, 1e-6, rope, 3, values[0], scales[0])
        normed = x.clone()
        ops.rms_norm_(normed, weight, 1e-6, rope, 3)
        ops.pack_heads(normed.view(7, heads, head_dim), values[1], scales[1])
        assert torch.equal(*values) and torch.equal(*scales)
        # and what they are: the norm's rounding moves a number by one step at most
        EagerOps().pack_normed(x.clone(), weight, 1e-6, rope, 3, values[1], scales[1])
        assert int((values[0].int() - values[1].int()).abs().max()) <= 1
        torch.testing.assert_close(*scales, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=0)


def check_norm_in_8_bits(device: str, dtype: torch.dtype, dim: int, rows: int = 7) -> None:
    """One kernel makes the same bits as the two that norm and quantise one after the other."""
    from lowvram_video.fused.triton_ops import NARROW, TritonOps
    from lowvram_video.weights.kernels.rows import TritonRowOps

    ops, row_ops = TritonOps(), TritonRowOps(fp8=True)
    x = rand(rows, 2 * dim, dtype=dtype, device=device)[:, :dim]  # rows of a wider buffer
    x *= torch.exp(2 * rand(rows, 1, seed=1)).to(device, dtype)
    x[2] = 0
    modulation = rand(3, 6, dim, seed=3, device=device).unbind(1)
    weight = rand(dim, seed=2, dtype=dtype, device=device)
    normed = {}
    for name, factors, bias in (("affine", weight, weight.flip(0)), ("zeros", 0 * weight, 0 * weight)):
        normed[name] = ops.affine_rows(x, factors, bias, 1e-6), ops.affine_norm(x, factors, bias, 1e-6)
    if dim > NARROW:
        given = (x, modulation[0], modulation[1], 2, -(-rows // 2), 1e-6)
        normed["modulated"] = ops.modulated_rows(*given), ops.modulated_norm(*given)
    for name, (late, want) in normed.items():
        assert isinstance(late, NormedRows) and torch.equal(late.tensor(), want), name
        for kind in (torch.int8, torch.float8_e4m3fn):
            (values, scales), both = (row_ops.quantize(each, kind) for each in (late, want))
            assert values.dtype == kind and torch.equal(scales, both[1]), (name, kind)
            assert torch.equal(values.view(torch.uint8), both[0].view(torch.uint8)), (name, kind)
            for part in (slice(0, 3), slice(3, rows)):
                some, some_scales = row_ops.quantize(late[part], kind)
                assert torch.equal(some.view(torch.uint8), values[part].view(torch.uint8)), (name, kind)
                assert torch.equal(some_scales, scales[part]), (name, kind)
    print(f"{device} {dtype} {dim}: {', '.join(normed)} in 8 bits are the same bits")


def test_rows_that_are_normed_late_are_the_steps_one_after_the_other() -> None:
    ops, x, modulation, weight = EagerOps(), rand(9, 48), rand(2, 3, 48, seed=1).unbind(0), rand(48, seed=2)
    modulated = NormedRows(ops, x, modulation[1], modulation[0], 1e-6, 1, 4)
    affine = NormedRows(ops, x, weight, -weight, 1e-6)
    assert torch.equal(modulated.tensor(), ops.modulated_norm(x, modulation[0], modulation[1], 1, 4, 1e-6))
    assert torch.equal(affine.tensor(), ops.affine_norm(x, weight, -weight, 1e-6))
    for rows in (modulated, affine):
        assert (rows.shape, rows.dtype, rows.device) == (x.shape, x.dtype, x.device)
        assert torch.equal(torch.cat([rows[:5].tensor(), rows[5:].tensor()]), rows.tensor())
        for kind in (torch.int8, torch.float8_e4m3fn):
            (values, scales), want = (
                rows.quantized(kind, LARGEST[kind], SMALLEST_SCALE),
                TorchRowOps().quantize(rows.tensor(), kind),
            )
            assert torch.equal(values.float(), want[0].float()) and torch.equal(scales, want[1])


@pytest.mark.parametrize("rotate", [False, True])
def test_packing_what_is_normed_is_both_steps(rotate: bool) -> None:
    x, weight, angle = rand(9, 24, seed=3), rand(24, seed=1), rand(5, 4, seed=2)
    rope = Rope(angle.cos(), angle.sin()) if rotate else None
    normed, values, scales = x.clone(), torch.empty(2, 9, 3, 8, dtype=torch.int8), torch.empty(2, 9, 3)
    EagerOps().rms_norm_(normed, weight, 1e-6, rope, 2)
    EagerOps().pack_heads(normed.view(9, 3, 8), values[0], scales[0])
    EagerOps().pack_normed(x, weight, 1e-6, rope, 2, values[1], scales[1])
    assert torch.equal(*values) and torch.equal(*scales)


def test_packed_heads_are_near_what_they_were() -> None:
    x = rand(50, 4, 128)
    values, scales, out = torch.empty(50, 4, 128, dtype=torch.int8), torch.empty(50, 4), torch.empty(50, 4, 128)
    EagerOps().pack_heads(x, values, scales)
    EagerOps().unpack_heads(values, scales, out)
    # the largest of a head is 127, and no number is off by more than half a step
    assert torch.equal(values.abs().amax(-1), torch.full((50, 4), 127, dtype=torch.int8))
    assert bool(((out - x).abs() <= 0.501 * scales[..., None]).all())
    error = float((out - x).norm() / x.norm())
    print(f"8 bits with a scale per token and head: relative error {error:.1e}")
    assert error < 8e-3


def check_triton(device: str, dtype: torch.dtype, dim: int, half: int, bound: float) -> None:
    from lowvram_video.fused.triton_ops import TritonOps

    torch.manual_seed(0)
    wide = rand(9, 2 * dim, dtype=dtype, device=device)
    x, y = wide[:, :dim], rand(9, dim, seed=1, dtype=dtype, device=device)  # x: rows of a wider buffer
    weight = rand(dim, seed=2, dtype=dtype, device=device)
    modulation = rand(4, 6, dim, seed=3, device=device).unbind(1)
    angle = rand(5, half, seed=4, device=device)
    rope, rows_per_group = Rope(angle.cos(), angle.sin()), 3
    results = []
    for ops in (TritonOps(), EagerOps()):
        rotated, plain, heads, head_rope, act, added = (wide.clone()[:, :dim] for _ in range(6))
        ops.rms_norm_(rotated, weight, 1e-6, rope, 2)
        ops.rms_norm_(plain, weight, 1e-6, None, 0)
        ops.rms_norm_(heads, weight[: 2 * half], 1e-6, None, 0)
        ops.rms_norm_(head_rope, weight[: 2 * half], 1e-6, rope, 2)
        ops.gelu_(act)
        ops.gated_add_(added, y, modulation[2], 1, rows_per_group)
        if dtype == torch.float16:  # infinities are the largest numbers
            large = y.clone()
            large[0, 0], added[1, 1] = torch.inf, 65504.0
            ops.gated_add_(added, large, modulation[2].abs(), 1, rows_per_group)
            lost = added.clone()
            large[0, 1], lost[2, 0] = torch.nan, torch.nan
            ops.gated_add_(lost, large, modulation[2], 1, rows_per_group)
            assert lost[0, 1].isnan() and lost[2, 0].isnan(), "what is no number stays none"
        norm = ops.modulated_norm(x, modulation[0], modulation[1], 1, rows_per_group, 1e-6)
        into = torch.full_like(y, torch.nan)
        assert ops.modulated_norm(x, modulation[0], modulation[1], 1, rows_per_group, 1e-6, into) is into
        assert torch.equal(into, norm)
        affine = ops.affine_norm(x, weight, y[0], 1e-6)
        results.append([norm, affine, rotated, plain, heads, head_rope, act, added])
    names = ["norm", "affine", "rope", "rms", "heads", "heads, rope", "gelu", "add"]
    for name, got, want in zip(names, *results, strict=True):
        error = float((got.float() - want.float()).abs().max() / want.float().abs().max())
        print(f"{device} {dtype} {name}: max relative error {error:.1e}")
        assert error <= bound, name


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_triton_is_given_no_weights_in_8_bits(stored: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot read them on GPUs before compute capability 8.9, and files that were cast whole have such norms."""
    triton_ops = pytest.importorskip("lowvram_video.fused.triton_ops")
    given: list[torch.dtype] = []

    class Kernel:
        def __getitem__(self, grid: object) -> object:
            return lambda *values, **_: given.extend(v.dtype for v in values if isinstance(v, torch.Tensor))

    norms = ("layer_norm_kernel", "layer_norm_in_8_bits_kernel", "_rms_norm_kernel", "_head_norm_kernel")
    for name in (*norms, "_pack_normed_kernel"):
        monkeypatch.setattr(triton_ops, name, Kernel())
    x, weight = rand(4, 32, dtype=torch.bfloat16), rand(32).to(stored)
    ops = triton_ops.TritonOps()
    ops.affine_norm(x, weight, weight, 1e-6)
    ops.rms_norm_(x, weight, 1e-6, None, 0)
    ops.rms_norm_(x, weight[:8], 1e-6, None, 0)
    assert given and set(given) == {torch.bfloat16}
    given.clear()
    ops.affine_rows(x, weight, weight, 1e-6).quantized(torch.int8, 127.0, 1e-30)
    assert given.count(torch.bfloat16) == 3 and not set(given) & {stored}
    given.clear()
    ops.pack_normed(x, weight, 1e-6, None, 0, torch.empty(4, 4, 8, dtype=torch.int8), torch.empty(4, 4))
    assert given.count(torch.bfloat16) == 4 and not set(given) & {stored}  # x, the weight, and x for no angles


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("dim", [256, 1536, 3072, 5120])
def test_triton_on_the_gpu(dtype: torch.dtype, bound: float, dim: int) -> None:
    check_triton("cuda", dtype, dim, 64, bound)
    check_packing("cuda", dtype)
    check_normed_packing("cuda", dtype, dim // 128, 128)
    check_normed_packing("cuda", dtype, 3, 96)
    assert select_fused_ops(torch.device("cuda")).name == "triton"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [256, 1536, 2560, 3072, 5120])
def test_norms_in_8_bits_on_the_gpu(dtype: torch.dtype, dim: int) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("casts to fp8 need compute capability 8.9")
    check_norm_in_8_bits("cuda", dtype, dim, rows=4096)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's wheels are for Linux")
def test_triton_interpreted_on_the_cpu() -> None:
    # the interpreter is chosen when kernels are defined: a process of its own
    code = f"import sys, torch; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_fused as t; "
    code += (
        "[t.check_triton('cpu', torch.float32, *sizes, 1e-5) for sizes in ((24, 4), (64, 4), (36, 6), (2304, 64))]; "
    )
    code += "t.check_triton('cpu', torch.float16, 24, 4, 2e-3); "
    code += "t.check_packing('cpu', torch.float32); "
    code += "[t.check_normed_packing('cpu', torch.float32, *sizes) for sizes in ((3, 8), (5, 12), (12, 4), (1, 16))]"
    code += "; [t.check_norm_in_8_bits('cpu', *given) for given in ("
    code += "(torch.float16, 24), (torch.bfloat16, 48), (torch.float16, 2304), (torch.bfloat16, 2128))]"
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)


def test_without_a_gpu_eager_is_chosen() -> None:
    assert select_fused_ops(torch.device("cpu")).name == "eager"
