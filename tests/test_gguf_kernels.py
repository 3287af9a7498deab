"""The Triton kernels of the GGUF types against the torch reference: interpreted, compiled ahead, and on a GPU."""

import os
import re
import subprocess
import sys

import pytest
import torch
from lowvram_video.weights.kernels.gguf_op import dequantize_packed, triton_agrees
from lowvram_video.weights.kernels.gguf_reference import BLOCK_TYPES, dequantize_reference, random_blocks
from torch import Tensor

TYPES = sorted(BLOCK_TYPES)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Triton's wheels are for Linux")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def ulps(got: Tensor, want: Tensor) -> int:
    """The most representable values that two bf16 or fp16 tensors lie apart."""

    def ordered(x: Tensor) -> Tensor:
        bits = x.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return int((ordered(got) - ordered(want)).abs().max())


def check_kernel(quant: str, device: str, num_blocks: int, dtype: torch.dtype) -> None:
    """One launch: fp32 exact, 16-bit dtypes within a unit in the last place, and nothing written outside."""
    from lowvram_video.weights.kernels.gguf_launch import dequantize_triton

    block = BLOCK_TYPES[quant]
    packed = random_blocks(quant, num_blocks, torch.Generator().manual_seed(num_blocks)).to(device)
    want = dequantize_reference(packed, quant, (num_blocks, block.elements)).to(dtype)
    guarded = torch.full((num_blocks + 2, block.elements), 12345.0, dtype=dtype, device=device)
    dequantize_triton(packed, quant, guarded[1:-1])
    got = guarded[1:-1]
    apart = 0 if dtype == torch.float32 else ulps(got, want)
    print(f"{device} {quant} x {num_blocks} -> {dtype}: {apart} ulp apart, equal: {torch.equal(got, want)}")
    assert torch.equal(got, want) if dtype == torch.float32 else apart <= 1, quant
    assert bool((guarded[0] == 12345).all() and (guarded[-1] == 12345).all()), quant


@LINUX
def test_interpreted_on_the_cpu() -> None:
    # the interpreter is chosen when kernels are defined: a process of its own
    code = f"import sys, torch; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_gguf_kernels as t; "
    code += "[t.check_kernel(q, 'cpu', n, d) for q in t.TYPES for n, d in "
    code += "((1, torch.float32), (37, torch.float32), (37, torch.bfloat16), (5, torch.float16))]"
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)


@LINUX
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("quant", TYPES)
def test_compiled_ahead_stores_whole_words_from_registers(quant: str, capability: int) -> None:
    """What makes the kernels fast, checked without a GPU: 16-byte stores, no shared memory, few instructions."""
    from lowvram_video.weights.kernels.gguf_launch import LAUNCHES
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch = LAUNCHES[quant]
    aligned = {(n,): [["tt.divisibility", 16]] for n in range(3)}
    signature = {"packed_ptr": "*u8", "out_ptr": "*bf16", "num_chunks": "i32", "ROWS": "constexpr"}
    source = ASTSource(launch.kernel, signature, {(3,): launch.rows}, aligned)
    kernel = triton_compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": launch.num_warps})
    stores = re.findall(r"st\.global\S*", kernel.asm["ptx"])
    per_thread = launch.rows // (32 * launch.num_warps) * BLOCK_TYPES[quant].elements // launch.chunks
    instructions = len(re.findall(r"^\t(?!//)\S", kernel.asm["ptx"], re.M)) / per_thread
    print(f"{quant} for {capability}: {len(stores)} stores, {instructions:.1f} PTX instructions per element")
    assert set(stores) == {"st.global.v4.b32"}
    assert len(stores) * 8 == per_thread
    assert kernel.metadata.shared == 0
    assert "local" not in kernel.asm["ptx"]


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quant", TYPES)
def test_on_the_gpu(quant: str, dtype: torch.dtype) -> None:
    for num_blocks in (1, 37, 4096):
        check_kernel(quant, "cuda", num_blocks, dtype)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("quant", TYPES)
def test_the_operator_uses_them(quant: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    assert triton_agrees(quant, device)
    packed = random_blocks(quant, 64, torch.Generator().manual_seed(0)).to(device)
    out = torch.empty(64, BLOCK_TYPES[quant].elements, device=device, dtype=torch.bfloat16)
    with torch.inference_mode():
        dequantize_packed(packed, out, quant)
    want = dequantize_reference(packed, quant, tuple(out.shape)).bfloat16()
    assert ulps(out, want) <= 1
