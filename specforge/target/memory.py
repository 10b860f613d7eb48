"""How a lack of memory shows in the libraries that run the target."""

from __future__ import annotations

import torch

SIGNS = (
    "DefaultCPUAllocator: can't allocate memory",  # torch on a CPU
    "out of memory",  # CUDA's own calls; SGLang's pools of KV cache ("Prefill out of memory") and of requests
    "CUBLAS_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
)


def is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)
