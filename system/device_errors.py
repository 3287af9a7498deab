"""How a device says that it has no memory left: PyTorch's allocator, CUDA's libraries, Triton: each in its words."""

from __future__ import annotations

import torch

# cuBLAS and cuDNN allocate by themselves, beside PyTorch's allocator, and so does the driver where a kernel is loaded.
# `cublasCreate` says NOT_INITIALIZED where its workspace finds no room.
PHRASES = (
    "out of memory",  # "CUDA error: ...", "CUDA driver error: ...", "Triton Error [CUDA]: ...", "HIP ..."
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cudaErrorMemoryAllocation",
    "CUDA_ERROR_OUT_OF_MEMORY",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device has no memory left, whichever library raised it.

    Catch RuntimeError around device work, ask this, and raise again what is something else.
    """
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in PHRASES)
