"""An out-of-memory is known by whoever raises it: the allocator, cuBLAS, cuDNN, the driver, Triton."""

import pytest
import torch
from lowvram_video.system.device_errors import is_out_of_memory

SAID_BY_LIBRARIES = [
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN Frontend error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "Triton Error [CUDA]: out of memory",
    "HIP out of memory. Tried to allocate 2.00 GiB",
]
SOMETHING_ELSE = [
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSetStream`",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "Triton Error [CUDA]: invalid device function",
    "out of resource: shared memory, Required: 262144, Hardware limit: 101376",
]


def test_the_allocators_own_error_is_one() -> None:
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"))


@pytest.mark.parametrize("text", SAID_BY_LIBRARIES)
def test_errors_of_libraries_are(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))


@pytest.mark.parametrize("text", SOMETHING_ELSE)
def test_other_errors_are_not(text: str) -> None:
    assert not is_out_of_memory(RuntimeError(text))


@pytest.mark.parametrize("error", [MemoryError(), ValueError("out of memory"), KeyboardInterrupt()])
def test_neither_is_what_no_device_raises(error: BaseException) -> None:
    assert not is_out_of_memory(error)
